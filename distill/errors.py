"""Errors of the distillation package."""

from envs.errors import EngrainError, UsageError


class DistillConfigError(UsageError):
    """A training setting, or a pair of models, that cannot work."""


class UnsupportedModelError(UsageError):
    """The model's logits are not its output head applied to its last hidden state."""


class VocabularyMismatchError(UsageError):
    """Teacher and student do not share a vocabulary."""


class DivergedError(EngrainError):
    """Training was stopped by the divergence guard."""


class CheckpointError(UsageError):
    """A checkpoint folder is missing, damaged, or belongs to another base model or run."""


class ProcessFailedError(EngrainError):
    """Another process of the run failed; this one stops with it."""
