"""The one exception that a user sees as a message instead of a traceback."""


class UserError(Exception):
    """Bad input. The message names the setting, its value and what to do; `train.py` prints it and
    exits.

    `exit_code` is 2 for a command line or a TOML file that cannot be used, 1 for what is found
    later.
    """

    def __init__(self, message: str, *, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
