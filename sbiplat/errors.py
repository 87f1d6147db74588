"""What a user is told when something is wrong: one line that says what, where, and the mend."""


class UserError(Exception):
    """A mistake that the user can mend. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 2
    details: dict[str, object] | None = None  # more of it, for machines


class PriorError(UserError):
    """A prior that cannot be: a bad bound, a name given twice, an unknown distribution."""


class SimulatorError(UserError):
    """A simulator that breaks its contract, or a name under which none is registered."""


class SymmetryError(UserError):
    """A group action that is none, or that the simulator does not have as declared."""


class BankError(UserError):
    """A bank that is missing, damaged, or of another simulator, prior or seed."""


class RunError(UserError):
    """A run directory that is missing, damaged, or of another format version."""


class OtherTraining(RunError):
    """A run directory that holds a training with other settings, or on another bank."""


class Diverged(RunError):
    """A training whose loss or gradient is not finite, again and again."""


class ObservationError(UserError):
    """An observation of the wrong shape, with NaN, or in a file that cannot be read."""


class SettingError(UserError):
    """A setting with an unknown name or an impossible value."""


class LeakageError(UserError):
    """A density over theta with nearly all of its mass beyond the prior's support."""


class Misspecified(UserWarning):
    """A warning: an observation is unlike all that the simulator made, so that nothing vouches for its posterior."""


class Unreliable(UserWarning):
    """A warning: importance weights of which a few draws carry nearly all, so that neither draws nor evidence are to be relied on."""


class Uncertified(UserError):
    """A posterior without a certificate that holds for its exact weights and bank."""

    exit_code = 4
