"""The exceptions of the data package."""


class DataError(ValueError):
    """Data that cannot be used.

    The message names the place (file and line, or row), the field, what was found, what was expected and, where there
    is one, the way out. It never quotes the content of a row.
    """


class BadRow(Exception):
    """One row that cannot be used.

    The message is the reason alone, without place or content, so that rows with the same defect are counted together.
    """
