"""The errors a user can meet; each message says what came, what was needed and what to do."""


class SpiceError(Exception):
    """Base of every error that is reported as one sentence with exit code 2, without a traceback."""


class ConfigError(SpiceError):
    """A recipe, a setting or a flag that cannot be used."""


class DataError(SpiceError):
    """A source or a set of shards that cannot be clustered."""


class StorageError(SpiceError):
    """An artifact or a run folder that is damaged, incomplete or belongs to another run."""


class UnreachableError(StorageError):
    """A server that does not answer or refuses, which may be over at the next try."""


class DamagedError(StorageError):
    """A shard file whose bytes are not those that were written."""


class ResourceError(SpiceError):
    """More processors or accelerators asked for than the cluster has, or a compiler that a node has not."""


class TrainingError(SpiceError):
    """A stage that could not finish."""
