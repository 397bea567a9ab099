"""The errors that a user can mend: one line that names the thing, the value and the remedy."""


class MDNError(ValueError):
    """A mistake in what the user gave; the message is one line and ends with the remedy."""

    # Raised while TensorFlow traces a step, an error keeps its type only if it is made this way;
    # raised in a layer's call, its message stays one line only if Keras takes it for annotated.
    __init__ = Exception.__init__
    _keras_call_info_injected = True


class ConfigError(MDNError):
    """A config key, type, value or combination that cannot work."""


class DataError(MDNError):
    """Rows that cannot be read, or that no density can be fitted to."""


class RunError(MDNError):
    """A run directory, checkpoint or device that cannot be used as asked."""
