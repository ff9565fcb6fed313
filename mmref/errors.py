"""Every error a user can cause, by name. A message says what was found, where, and how to mend it."""


class MMRefError(Exception):
    """Base of all errors below: the command line prints the message alone, without a traceback."""

    exit_status = 1


class UsageError(MMRefError):
    """A command line says what cannot be meant: options that do not go together, or none of what is needed."""

    exit_status = 2  # as of argparse, which knows each option by itself


class PathError(UsageError):
    """A path is not what its user can mean: empty, of an unknown user, with a variable that nothing expands, or a URL where
    only a path of this machine will do."""


class FileError(MMRefError):
    """A file or folder that a command needs cannot be used: not there, no permission, of another kind, too long a name."""


class TextError(UsageError):
    """A text given on the command line is no UTF-8."""


class OutputError(MMRefError):
    """Standard output cannot be written, as on a full disk."""


class ReaderLeftError(OutputError):
    """Whatever read standard output has ended, as `head` does: the command ends without a word."""

    exit_status = 141  # 128 + SIGPIPE, as of other commands


class ConfigError(UsageError):
    """A config file or flag holds an unknown key, a value of the wrong type, or a combination that cannot work."""


class ExtraMissingError(MMRefError):
    """A command needs packages that are installed with an extra, and they are not here."""


class BatchArithmeticError(ConfigError):
    """The global batch does not divide over workers, accumulation and images per object."""


class NeighborsError(ConfigError):
    """A file of neighbors is not there, damaged, or of another shard set than the one that is trained on."""


class ClusterTooSmallError(MMRefError):
    """The cluster has too few CPUs or GPUs for the workers and Ray Data beside them."""


class ClusterStartError(MMRefError):
    """Ray does not start on this machine, or the cluster that RAY_ADDRESS names cannot be joined."""


class RunDirectoryError(MMRefError):
    """The run directory cannot be written, or holds a run of another config."""


class ShardSetError(MMRefError):
    """A shard set is missing, incomplete, or does not match its manifest."""


class SourceError(MMRefError):
    """A data source (folder, table, package) does not have the expected layout or content."""


class SampleError(MMRefError):
    """One sample cannot be used: broken image, no caption. Counted and replaced in training, listed in evaluation."""


class OutsideError(SampleError):
    """A table names an image outside of the folder or prefix of its images, and nobody has allowed it."""


class PixelLimitError(SampleError):
    """An image has more pixels than are decoded."""


class DecodersBusyError(MMRefError):
    """No room was left in time to decode an image beside the others."""


class TooManyBadSamplesError(MMRefError):
    """More samples are broken than `data.max_bad_fraction` allows."""


class TooFewObjectsError(ConfigError):
    """The split has fewer objects than a global step needs."""


class TooFewPairsError(ConfigError):
    """The train split has fewer pairs of images and captions than `loss.align: rde` can divide."""


class TooFewJudgementsError(MMRefError):
    """There are too few judgements to train on, or to evaluate with."""


class ModelError(MMRefError):
    """A backbone or tokenizer cannot be loaded or does not fit the config."""


class CheckpointError(MMRefError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another model."""


class WorkerDiedError(MMRefError):
    """Processes that embed images die, whatever they are given."""


class StorageError(MMRefError):
    """Storage keeps failing: full, unreachable, or not shared between the nodes; or an output cannot be written."""


class FileSystemMissingError(StorageError):
    """A URL is of a kind that nothing installed here opens."""


class HubError(ModelError):
    """A hub of models has no such repository, or fails."""


class HubTokenError(HubError):
    """A hub wants a token, or another one than it gets."""


class HubUnreachableError(HubError):
    """A hub does not answer, and what is asked of it is not in the cache."""


class TrainingStoppedError(MMRefError):
    """Training was asked to stop (SIGTERM, Ctrl-C) and did so at a checkpoint; the same command resumes it."""

    exit_status = 143  # 128 + SIGTERM, 130 on Ctrl-C: whatever starts the job again on failure does so


class SinkError(ConfigError):
    """`train.sinks` names what nothing here provides, or what needs a package that is not installed."""


class LedgerError(MMRefError):
    """A run has no ledger of the samples it saw, or it cannot be read."""


class NonFiniteLossError(MMRefError):
    """The loss, its gradient or what a step made of the weights is not finite: training stopped before any checkpoint was
    overwritten."""


class DeviceMemoryError(MMRefError):
    """A worker's GPU has no memory left: the same step would meet the same end, so the run stops."""


class EvaluationError(MMRefError):
    """Nothing can be measured: scores or features hold NaN, or no query has a match in the gallery."""


class DenseCodesError(EvaluationError):
    """Dense codes of refinement would take more memory than is allowed: a number for each item and each object."""


class ExportError(MMRefError):
    """A run cannot be exported: not evaluated yet, or the target exists."""


class ReferencesError(MMRefError):
    """References cannot be added or removed: objects that are not there, none that are new, or none that would be left."""


class SearchIndexError(MMRefError):
    """A search index is missing, unfinished, damaged, in use by another writer, or does not hold what is asked of it."""


class EmptySourceError(SearchIndexError):
    """A source of images is not there, or holds none."""


class ManyMissingError(SearchIndexError):
    """More of a source's images are gone than an index is to lose at once."""


class ModelMismatchError(SearchIndexError):
    """The model is not the one whose features an index holds."""


class QueryError(MMRefError):
    """A search cannot be answered: nothing asked, an unreadable image, an unknown column, more results than items."""


class FilterError(QueryError):
    """A filter of a search cannot be read, or a value or operator of it does not fit its column."""


class UnknownColumnError(QueryError):
    """An index has no column of the name that a search filters or sorts by."""


class ServiceError(MMRefError):
    """A search service that is asked refuses, fails, or cannot be reached."""


class StoreError(MMRefError):
    """An engine that holds an index's rows does not answer, refuses, or holds something else."""


class ServeError(MMRefError):
    """The service cannot be started: no token, a port in use, two indexes of one name."""


class SweepError(MMRefError):
    """A sweep ended without a single trial that has a score, or trainings of an ablation failed."""


class SweepInterruptedError(MMRefError):
    """A sweep was interrupted (Ctrl-C); `mmref tune --resume` goes on with it."""

    exit_status = 130  # 128 + SIGINT
