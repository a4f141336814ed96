"""`gptq-api quantize MODEL OUT`: an FP16 model becomes a GPTQ checkpoint."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptq_api import exits
from gptq_api.cli.output import fail
from gptq_api.config import QuantizeSettings
from gptq_api.errors import UserError
from gptq_api.hub import is_hub_name, local_model
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.samples import SamplesError, encode_documents, hold_out, read_documents, spread, windows
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gptq_api.checkpoint.checkpoint import Checkpoint
    from gptq_api.quantize.driver import Recipe
    from gptq_api.quantize.work import ModuleReport

_LONGEST_SAMPLE = 2048
_BATCH_TOKENS = 8192


def run(settings: QuantizeSettings) -> int:
    """Exit status: 0 the checkpoint is there, 1 it could not be made (a sentence on stderr), 130 stopped by ^C."""
    try:
        _run(settings)
    except UserError as error:
        fail("quantize", error)
        return exits.FAILED
    except KeyboardInterrupt:
        print("\ngptq-api quantize: stopped; the same command goes on with the layers that are left", file=sys.stderr)
        return exits.INTERRUPTED
    return exits.DONE


def _run(settings: QuantizeSettings) -> None:
    from gptq_api.checkpoint.dense import open_dense
    from gptq_api.model.modules import config_of, modules
    from gptq_api.quantize import gptq as quantizer
    from gptq_api.quantize.block import batches
    from gptq_api.quantize.card import TextsInWords, low_zeros_warning, model_card
    from gptq_api.quantize.driver import Recipe, check_shapes, quantize_model
    from gptq_api.quantize.output import MAX_SHARD_BYTES, write_checkpoint
    from gptq_api.quantize.work import WorkFolder
    from gptq_api.runner.backends import backend_of, resolve_device, set_threads

    console = Console(stderr=True, highlight=False, markup=False)
    folder = Path(local_model(settings.model_path, settings.revision, settings.gptq_ckpt))
    out = settings.out
    source = open_dense(folder, settings.gptq_ckpt)
    config = config_of(source)
    check_shapes(config, settings.bits)
    tokenizer = load_tokenizer(folder)
    device = resolve_device(settings.device)
    set_threads(device, settings.num_threads)
    group_size, about_groups = _group_size(settings, max(module.in_features for module in modules(config)))
    recipe = Recipe(
        quantizer.QuantizeOptions(
            bits=settings.bits,
            group_size=group_size,
            sym=settings.sym,
            desc_act=settings.act_order,
            static_groups=settings.static_groups,
            act_group_aware=group_size > 0 and _group_aware(settings),
            damp_percent=settings.damp_percent,
        ),
        2 if settings.stored_format == "gptq_v2" else 1,
        settings.nearest,
    )
    length = settings.sample_length or min(_LONGEST_SAMPLE, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise SamplesError(
            f"--sample-length {length} is beyond the model's context of {config.max_position_embeddings}"
        )
    texts = _Texts(settings, folder, tokenizer, length, config.vocab_size)
    with WorkFolder(out, _fingerprint(source, recipe, texts, backend_of(device).kind)) as work:
        for sentence in (*about_groups, *texts.sentences):
            console.print(sentence, soft_wrap=True)
        with _Bar(console, len(modules(config)), config.num_hidden_layers) as bar:
            outcome = quantize_model(
                source,
                config,
                recipe,
                batches(texts.calibration, _BATCH_TOKENS),
                batches(texts.evaluation, _BATCH_TOKENS),
                work,
                device,
                bar.report,
            )
        name = settings.model_path if is_hub_name(settings.model_path) else folder.resolve().name
        words = TextsInWords(texts.calibration_words, texts.evaluation_words)
        card = model_card(out.resolve().name, name, recipe, words, outcome)
        write_checkpoint(source, config, recipe, card, work, MAX_SHARD_BYTES)
    low = sum(report.num_low_zeros for report in outcome.reports)
    if low and not settings.sym and settings.stored_format == "gptq":
        console.print(f"warning: {low_zeros_warning(low)}", soft_wrap=True)
    if outcome.perplexity_before is not None:
        console.print(
            f"perplexity {outcome.perplexity_before:.4f} before, {outcome.perplexity_after:.4f} after, on "
            f"{texts.evaluation_words}",
            soft_wrap=True,
        )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(f"{out}: {size / 2**20:.1f} MiB; gptq-api serve {out}", soft_wrap=True)


class _Texts:
    """What is calibrated and measured on."""

    def __init__(
        self, settings: QuantizeSettings, folder: Path, tokenizer: Tokenizer, length: int, num_rows: int
    ) -> None:
        """Raises SamplesError."""
        self.calibration: list[list[int]] = []
        self.evaluation: list[list[int]] = []
        self.calibration_words = "none"
        self.evaluation_words = "nothing"

        def read(path: Path) -> list[list[int]]:
            documents = read_documents(path)
            chats = any(isinstance(document, list) for document in documents)
            template = load_chat_template(folder, tokenizer) if chats else None
            return windows(encode_documents(documents, path, tokenizer, template, num_rows), length)

        num, num_eval = settings.num_samples, settings.num_eval_samples
        if settings.eval_text is not None:
            found = read(settings.eval_text)
            self.evaluation = spread(found, min(num_eval, len(found)))
            self.evaluation_words = f"{_count(self.evaluation, length)} of {settings.eval_text.name}"
        if settings.calibration is not None:
            found = read(settings.calibration)
            held_out = "" if self.evaluation else f" and {num_eval} to measure perplexity on"
            if len(found) < num + (num_eval if held_out else 0):
                raise SamplesError(
                    f"{settings.calibration} is too short: it gives {len(found)} samples of {length} tokens, and {num} "
                    f"are needed for calibration{held_out}; give more text, or lower --num-samples, "
                    "--num-eval-samples or --sample-length"
                )
            if held_out:
                found, self.evaluation = hold_out(found, num_eval)
                self.evaluation_words = (
                    f"{_count(self.evaluation, length)}, the end of {settings.calibration.name}, which calibration did "
                    "not see"
                )
            self.calibration = spread(found, num)
            self.calibration_words = f"{_count(self.calibration, length)} of {settings.calibration.name}"
        self.sentences = (f"calibration: {self.calibration_words}", f"perplexity on: {self.evaluation_words}")


def _group_size(settings: QuantizeSettings, most_inputs: int) -> tuple[int, list[str]]:
    """-> (the size to store, what to say about it). A size that no module fills is that of one group, and is stored as
    such; one that no kernel takes is made all the same, and said."""
    size = settings.group_size
    if size >= most_inputs:
        return -1, [
            f"--group-size {size}: no module has more than {most_inputs} inputs, so each output has one group (-1)"
        ]
    if size > 0 and size not in (32, 64) and size % 128:
        reads = "32, 64, multiples of 128 and -1 are what kernels take"
        return size, [f"warning: --group-size {size} is served slowly here, and refused by other programs; {reads}"]
    return size, []


def _group_aware(settings: QuantizeSettings) -> bool:
    """In groups of 32, a small LLaMA's perplexity was lower on 16 of 18 calibration sets with 3 bits. With 4 bits it
    depends on the text it is measured on: better on 20 of 24 with one, on three of six with another."""
    return settings.leaves_groups_to_reorder and (
        settings.bits < 4 if settings.group_aware is None else settings.group_aware
    )


def _count(texts: list[list[int]], length: int) -> str:
    return f"{sum(map(len, texts))} tokens in {len(texts)} samples of at most {length}"


def _fingerprint(source: Checkpoint, recipe: Recipe, texts: _Texts, device: str) -> dict[str, Any]:
    """What the layers depend on; the source by the names, sizes and times of its files."""
    s = recipe.settings
    files = [(file, file.stat()) for file in (*source.files, source.folder / "config.json")]
    return {
        "source": [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in files],
        "bits": s.bits,
        "group_size": s.group_size,
        "act_order": s.desc_act,
        "static_groups": s.static_groups,
        "act_group_aware": s.act_group_aware,
        "sym": s.sym,
        "damp_percent": s.damp_percent,
        "method": "nearest" if recipe.nearest else "gptq",
        "format": "gptq" if recipe.zero_version == 1 else "gptq_v2",
        "calibration": hashlib.sha256(repr(texts.calibration).encode()).hexdigest(),
        "device": device,
    }


class _Bar:
    """Progress on a terminal; a line per layer elsewhere."""

    def __init__(self, console: Console, modules_per_layer: int, num_layers: int) -> None:
        self._per_layer = modules_per_layer
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("reading", total=modules_per_layer * num_layers)
        self._layer: list[ModuleReport] = []

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, report: ModuleReport) -> None:
        _, _, index, module = report.module.split(".", 3)
        cost = "" if report.error is None else f" error {100 * report.error:.3f} %"
        self._progress.update(self._task, advance=1, description=f"layer {index} {module.split('.')[-1]}{cost}")
        self._layer.append(report)
        if len(self._layer) == self._per_layer:
            parts = [f"{r.module.rsplit('.', 1)[-1]} {100 * (r.error or 0):.3f} %" for r in self._layer]
            shown = ", ".join(parts) if report.error is not None else "rounded"
            self._console.print(f"layer {index}: {shown}", soft_wrap=True)
            self._layer = []
