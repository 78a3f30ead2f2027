"""The one error class for input that cannot be used."""


class InputError(ValueError):
    """A user's input cannot be used.

    The message is one sentence: what is wrong, where (file, module or argument), what was
    expected. The command line prints it and exits with status 2; nothing is half-written.
    """
