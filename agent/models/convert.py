"""Turns one GGUF file into a plain Hugging Face folder: bf16 safetensors, tokenizer, chat template.

Run as a process of its own (`python -m agent.models.convert GGUF FOLDER --eos 151645,151643`), so that the memory
it needs (7 to 8 bytes a weight) is gone when it ends and none of the libraries' noise reaches the user.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.models.errors import ConversionError

#: Tokenized before and after saving: the folder alone must give the same ids and the same text.
PROBE = "<|im_start|>user\nHéllo  wörld, don't:\n\t12345 + 0.5 = `x_1`? 🙂<|im_end|>\n"


def convert(gguf: Path, folder: Path, eos_ids: Sequence[int]) -> None:
    """Write the model in `gguf` to `folder` (made if need be) so that transformers loads it from there alone.

    The embeddings are tied: a head that the GGUF carries beside them is the same matrix quantised once more, and is
    dropped. `eos_ids[0]` is the end of turn, the others end a generation too.

    Raises:
        ConversionError: weights are missing or left over, or the tokenizer does not survive saving.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")  # its type hints are partial
    auto_model, auto_tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = auto_tokenizer.from_pretrained(**source)
    # float32 first: dequantising straight to bf16 takes the library's slow path.
    loaded, report = auto_model.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    missing = set(report["missing_keys"]) - {"lm_head.weight"}
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ConversionError(f"{gguf.name} does not fit its own architecture: {sorted(missing)[:3]}")

    weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = loaded.config
    del loaded
    # A model loaded from GGUF refuses to be saved, so the weights move into a fresh one of the same config.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = True
    config.dtype = torch.bfloat16
    config.eos_token_id = eos_ids[0]
    config._name_or_path = ""
    vars(config).pop("_model_name_or_path", None)  # the GGUF's own title, not a path
    with torch.device("meta"):
        model = auto_model.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=list(eos_ids) if len(eos_ids) > 1 else eos_ids[0],
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)

    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _check_tokenizer(tokenizer, auto_tokenizer.from_pretrained(str(folder)), eos_ids[0])


def _check_tokenizer(before: Any, after: Any, eos_id: int) -> None:
    ids = before.encode(PROBE, add_special_tokens=False)
    chat = [{"role": "user", "content": "hi"}]
    faults = [
        fault
        for fault, found in {
            "other ids after saving": after.encode(PROBE, add_special_tokens=False) != ids,
            "text changed by a round trip": after.decode(ids) != PROBE,
            "a begin-of-text id is added": after.encode(PROBE) != ids,
            "<|im_end|> is not one id": after.encode("<|im_end|>", add_special_tokens=False) != [eos_id],
            "end of turn is not the tokenizer's": after.eos_token_id != eos_id,
            "chat template lost": after.apply_chat_template(chat, tokenize=False)
            != before.apply_chat_template(chat, tokenize=False),
        }.items()
        if found
    ]
    if faults:
        raise ConversionError(f"the tokenizer cannot be trusted: {'; '.join(faults)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as a process: exit code 0, or 1 with the reason as the last line of stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--eos", required=True)
    options = parser.parse_args(arguments)
    try:
        convert(options.gguf, options.folder, [int(eos) for eos in options.eos.split(",")])
    except Exception as error:  # the parent process shows this line to the user
        reason = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {reason[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
