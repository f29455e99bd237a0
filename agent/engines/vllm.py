"""vLLM in this process: paged keys and values, prefix caching, and requests that come and go at any step.

Nothing of vLLM is imported before an engine is made. The engine works inside `generate` and `poll` only, in the calling
thread, so that there is no process to lose and none to clean up.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agent.constraint import Restriction, Vocabulary
from agent.engines.base import Completion, check_length
from agent.engines.folders import check_folder, check_weights, identity, is_adapter
from agent.engines.lora import can_merge, merged
from agent.engines.transformers import pick_device, pick_dtype
from agent.engines.vllm_process import import_vllm, one_line, start, undisturbed
from agent.episode import FinishReason, SamplingParams
from agent.errors import CheckpointError, EngineFailedError, ModelLoadError
from agent.renderer import Renderer
from envs.errors import EngrainError, UsageError

_CPU_CACHE = 2 * 2**30
_BLOCK = {"cpu": 32, "cuda": 16}  # tokens whose keys and values are cached together: prompts share whole blocks only


class VllmEngine:
    """Samples with vLLM. See `agent.engines.base.StreamingEngine` for the contract.

    Args:
        model: a Hugging Face folder.
        name: the base model's name as the user gave it.
        dtype: "auto" is bfloat16 where the device computes in it, else float32.
        max_context: the longest prompt plus completion, in tokens; None is the model's own limit.
        max_batch: the most requests under way together; others wait inside.
        cache_bytes: memory for keys and values; None is 2 GiB on a CPU, and on a GPU what `memory_share` leaves.
        memory_share: how much of a GPU's memory weights, keys and values may take together.
        adapters: how LoRA adapters are sampled from. "merge" writes them into the weights: sampling costs what the
            base model's does, a switch as much as loading the model. "beside" keeps the base weights: a switch is
            quick, sampling slower (several times on a CPU). "auto" is "merge" on a CPU, else "beside".
        lora_rank: the highest rank of an adapter with "beside": 8, 16, 32, 64, 128, 256, 320 or 512.
        compiled: compile the model at start, which takes a while and pays for long runs. None: on a GPU only.

    Raises:
        MissingPackageError: vLLM is not installed, or does not import.
        ModelLoadError: vLLM cannot run the model, or it does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        name: str,
        dtype: str | torch.dtype = "auto",
        max_context: int | None = None,
        max_batch: int = 64,
        cache_bytes: int | None = None,
        memory_share: float = 0.9,
        adapters: Literal["auto", "merge", "beside"] = "auto",
        lora_rank: int = 64,
        compiled: bool | None = None,
    ) -> None:
        self.model = name
        self.checkpoint: str | None = None
        self._source = str(model)
        self._vllm = import_vllm()
        on_cpu: bool = self._vllm.platforms.current_platform.is_cpu()  # there is a build for each
        device = pick_device("cpu" if on_cpu else "auto")
        self._dtype = pick_dtype(dtype, device)
        self._beside = adapters == "beside" or (adapters == "auto" and not on_cpu)
        self.can_sleep: bool = not on_cpu
        arguments: dict[str, Any] = {
            "model": self._source,
            "dtype": str(self._dtype).removeprefix("torch."),
            "load_format": "safetensors",
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "enable_prefix_caching": True,
            "block_size": _BLOCK.get(device.type),
            # On a CPU prompts are read whole: vLLM cannot take back what a seeded request sampled after a part of one.
            "enable_chunked_prefill": False if on_cpu else None,
            "max_num_seqs": max_batch,
            "max_model_len": max_context,
            "kv_cache_memory_bytes": cache_bytes or (_CPU_CACHE if on_cpu else None),
            "gpu_memory_utilization": memory_share,
            "enforce_eager": not (compiled if compiled is not None else not on_cpu),
            "enable_sleep_mode": self.can_sleep,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self._beside:
            arguments |= {"enable_lora": True, "max_lora_rank": lora_rank, "max_loras": 1, "max_cpu_loras": 4}
        try:
            with undisturbed():
                self._engine: Any = start(self._vllm.EngineArgs(**arguments))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self._source, trust_remote_code=False)
        except Exception as error:  # vLLM raises what its many parts raise
            raise ModelLoadError(f"vLLM cannot run {name} from {self._source}: {one_line(error)}") from error
        self.renderer = Renderer(self.tokenizer)
        self._numbers = count()
        self._running: set[int] = set()
        self._finished: list[tuple[int, Completion | EngrainError]] = []
        self._weights = self._source  # the folder that the weights in memory are of
        self._lora: Any = None
        self._known: dict[tuple[str, int, int], Any] = {}  # adapters that vLLM has seen, by folder and its state

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return int(self._engine.model_config.max_model_len)

    @property
    def pending(self) -> int:
        """Requests submitted whose results `poll` has not returned yet."""
        return len(self._running) + len(self._finished)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            ContextLengthError: a prompt plus its max_tokens exceeds max_context.
            ConstraintError: a prompt's choices cannot be written with the model's tokens.
            EngineFailedError: vLLM failed, or the model's logits are not numbers.
        """
        pairs = list(zip(prompts, sampling, strict=True))
        for prompt, params in pairs:
            self._check(prompt, params)
        mine: dict[int, Completion | EngrainError] = {}
        numbers: list[int] = []
        others = []
        try:
            numbers += (self.submit(prompt, params) for prompt, params in pairs)
            while len(mine) < len(numbers):
                for number, result in self.poll():
                    if number in numbers:
                        mine[number] = result
                    else:
                        others.append((number, result))
        finally:
            self.cancel(numbers)  # of an interrupted call; the others have ended
            self._finished = others + self._finished
        completions = []
        for number in numbers:
            result = mine[number]
            if not isinstance(result, Completion):
                raise result
            completions.append(result)
        return completions

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> int:
        """Take one more request without waiting for it; the number that `poll` will name it by.

        Raises:
            ContextLengthError: the prompt plus its max_tokens exceeds max_context.
            ConstraintError: the choices cannot be written with the model's tokens.
        """
        self._check(prompt, sampling)
        number = next(self._numbers)
        request = {"prompt_token_ids": list(prompt)}
        try:
            self._engine.add_request(str(number), request, self._params(sampling), lora_request=self._lora)
        except Exception as error:  # vLLM raises what its many parts raise
            raise EngineFailedError(f"vLLM refuses a request to {self.model}: {one_line(error)}") from error
        self._running.add(number)
        return number

    def poll(self, timeout: float = 0.0) -> list[tuple[int, Completion | EngrainError]]:
        """Work until a request is finished, or for about `timeout` seconds; everything finished by then.

        Every running request gets at least one token.

        Raises:
            EngineFailedError: vLLM failed; no request will finish.
        """
        deadline = time.monotonic() + timeout
        while self._running and not self._finished:
            self._step()
            if time.monotonic() >= deadline:
                break
        finished, self._finished = self._finished, []
        return finished

    def cancel(self, requests: Sequence[int]) -> None:
        """Give requests up; `poll` does not return them any more. Finished and unknown ones are ignored."""
        unwanted = set(requests)
        given_up = self._running & unwanted
        self._running -= given_up
        self._finished = [(number, result) for number, result in self._finished if number not in unwanted]
        if given_up:
            self._engine.abort_request([str(number) for number in given_up])

    def load(self, checkpoint: Path | None) -> None:
        """Sample from this checkpoint folder from now on; None is the base model.

        A folder with `adapter_config.json` is a LoRA adapter of the base model; one with `config.json` is a whole
        model of its architecture and sizes. A folder whose files have changed is loaded anew.

        Raises:
            CheckpointError: the folder holds neither, or does not fit, or requests are under way.
        """
        if self._running:
            raise CheckpointError(
                f"{len(self._running)} requests are under way and weights cannot change beneath them; "
                "poll until they are finished, or cancel them"
            )
        if checkpoint is not None:
            check_folder(checkpoint)
            if not is_adapter(checkpoint):
                check_weights(checkpoint, Path(self._source))
        self._lora = self.checkpoint = None
        try:
            if checkpoint is None:
                self._use_weights(self._source)
            elif not is_adapter(checkpoint):
                self._use_weights(str(checkpoint))
            elif self._beside:
                self._use_weights(self._source)
                self._lora = self._attach(checkpoint)
            else:
                self._merge(checkpoint)
        except Exception as error:  # vLLM raises what its many parts raise
            self._weights = ""  # who knows what is in memory now
            self._use_weights(self._source)
            raise CheckpointError(f"checkpoint {checkpoint} does not fit {self.model}: {one_line(error)}") from error
        if checkpoint is not None:
            self.checkpoint = identity(checkpoint)

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`: weights move to the host, keys and values are dropped.

        Raises:
            UsageError: on a CPU, where vLLM cannot (`can_sleep` is False), or requests are under way.
        """
        if not self.can_sleep:
            raise UsageError("vLLM cannot sleep on a CPU; close the engine to free its memory")
        if self._running:
            raise UsageError(f"{len(self._running)} requests are under way; poll until they are finished first")
        self._engine.sleep(level=1)

    def wake(self) -> None:
        """Take the GPU's memory again after `sleep`; does nothing to an engine that is awake."""
        if self.can_sleep and self._engine.is_sleeping():
            self._engine.wake_up()

    def close(self) -> None:
        """Free the model's memory. Requests under way are lost. A closed engine may be closed again."""
        engine, self._engine = self._engine, None
        self._running.clear()
        self._finished.clear()
        if engine is not None:
            with suppress(Exception):  # the rest is still to be freed
                engine.renderer.shutdown()
            engine.engine_core.shutdown()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        check_length(self, prompt, sampling.max_tokens)
        if sampling.choices:
            Restriction(self._vocabulary, sampling.choices)

    def _params(self, sampling: SamplingParams) -> Any:
        restricted = None
        if sampling.choices:
            restricted = self._vllm.sampling_params.StructuredOutputsParams(
                choice=list(dict.fromkeys(sampling.choices))
            )
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=sorted(self._vocabulary.ends if sampling.choices else self._stop_ids),
            logprobs=0,  # the sampled id's own
            detokenize=False,
            structured_outputs=restricted,
        )

    def _step(self) -> None:
        """One pass of the model over everything that runs."""
        try:
            outputs = self._engine.step()
        except Exception as error:  # vLLM raises what its many parts raise
            self._running.clear()
            raise EngineFailedError(f"vLLM failed with {self.model}: {one_line(error)}") from error
        for output in outputs:
            number = int(output.request_id)
            if output.finished and number in self._running:
                self._running.discard(number)
                self._finished.append((number, self._completion(output)))

    def _completion(self, output: Any) -> Completion | EngrainError:
        sample = output.outputs[0]
        if sample.finish_reason not in ("stop", "length"):
            return EngineFailedError(f"vLLM broke off a request to {self.model}: {sample.finish_reason}")
        ids = tuple(map(int, sample.token_ids))
        logprobs = tuple(float(entry[id_].logprob) for id_, entry in zip(ids, sample.logprobs, strict=True))
        if any(map(math.isnan, logprobs)):
            return EngineFailedError(
                "the model's logits are not numbers (NaN); its weights are damaged, or the number format "
                "is too small for them: try dtype float32"
            )
        return Completion(ids, logprobs, FinishReason(sample.finish_reason), max(0, output.num_cached_tokens or 0))

    def _use_weights(self, folder: str) -> None:
        """Have these whole weights in memory."""
        if folder == self._weights == self._source:
            return
        self._weights = folder
        with undisturbed():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._engine.reset_prefix_cache()

    def _merge(self, adapter: Path) -> None:
        """Write the adapter into the weights: W + scale * B A, rounded once, as the transformers engine does."""
        base: Any = AutoModelForCausalLM.from_pretrained(
            self._source, dtype=self._dtype, use_safetensors=True, trust_remote_code=False
        )
        network: Any = PeftModel.from_pretrained(base, str(adapter))
        with tempfile.TemporaryDirectory(prefix="engrain-merged-") as folder:
            if can_merge(network):
                with merged(network):
                    _save_merged(network, folder)
            else:
                network.merge_and_unload().save_pretrained(folder)
            self._use_weights(folder)

    def _attach(self, adapter: Path) -> Any:
        """vLLM's handle of the adapter; a folder whose files have changed is another adapter."""
        files = [file.stat() for file in sorted(adapter.glob("adapter_*"))]
        state = (str(adapter.resolve()), sum(f.st_size for f in files), max(f.st_mtime_ns for f in files))
        if state not in self._known:
            number = len(self._known) + 1
            request = self._vllm.lora.request.LoRARequest(f"{adapter.name}-{number}", number, str(adapter))
            self._engine.add_lora(request)
            self._known[state] = request
        return self._known[state]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        try:
            eos = GenerationConfig.from_pretrained(self._source).eos_token_id
        except OSError:
            eos = None
        return self.renderer.stop_ids | frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def _save_merged(network: Any, folder: str) -> None:
    """Save the base model as it is now, its LoRA layers left out."""
    base = network.get_base_model()
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
    }
    base.save_pretrained(folder, state_dict=state)
