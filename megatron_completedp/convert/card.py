"""The model card: what the model is, how it was trained, on what, and how the export was proved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import to_yaml
from megatron_completedp.config.run import RunConfig
from megatron_completedp.convert.mapping import architecture_for
from megatron_completedp.convert.source import Source
from megatron_completedp.convert.verify import Verification
from megatron_completedp.core.render import markdown_table
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.data.manifest import load_manifest, manifest_path
from megatron_completedp.errors import DataError
from megatron_completedp.plan.run_plan import Plan

CARD_FILE = "README.md"
FIGURE_FILE = "training_loss.png"
METRICS_FILE = "metrics.jsonl"

#: Rows of the loss table.
_MAX_ROWS = 12

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```"""


def write_card(
    folder: Path, source: Source, verification: Verification | None, *, name: str
) -> None:
    """Write the card of the model in `folder`, and the figure of its training if there are metrics.

    What the run folder no longer has (metrics, manifests of its data) is left out, and said so.
    """
    shape, architecture = source.shape, architecture_for(source.shape)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [megatron_completedp]\n---",
        f"# {name}",
        f"A decoder of {shape.num_layers} layers, width {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads ({shape.kv_heads} of keys and values) of "
        f"{shape.head_dim}, {shape.parameters:,} parameters with padded vocabulary, trained on "
        f"sequences of {shape.seq_length} tokens. It is a plain `{architecture.class_name}`: the "
        "multipliers it was trained with are folded into its weights.",
        _USE.format(name=name),
    ]
    if source.config is not None:
        parts += _training(folder, source, source.config)
    if verification is not None:
        parts += ["## Verification against Megatron-Core, in fp32", f"```text\n{verification}\n```"]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _training(folder: Path, source: Source, config: RunConfig) -> list[str]:
    rows = read_whole_rows(source.run_dir / METRICS_FILE)
    parts = ["## Training", _loss_table(rows)]
    if rows:
        _draw_losses(rows, folder / FIGURE_FILE)
        parts.append(f"![loss against tokens]({FIGURE_FILE})")
    return [
        *parts,
        "## Data",
        _data_table(config),
        "## Hyperparameters, as resolved",
        f"```text\n{Plan.of(config)}\n```",
        "## Recipe",
        f"```yaml\n{to_yaml(config)}```",
    ]


def _loss_table(rows: Sequence[dict[str, Any]]) -> str:
    trained = [row for row in rows if row["kind"] == "train"]
    if not trained:
        return "The run folder has no metrics."
    valid = {row["step"]: f"{row['loss']:.4f}" for row in rows if row["kind"] == "eval"}
    stride = -(-len(trained) // _MAX_ROWS)
    chosen = trained[::-1][::stride][::-1]  # the last one always
    return "Losses in nats per token.\n\n" + markdown_table(
        ("step", "tokens", "training loss", "validation loss"),
        (
            (
                str(row["step"]),
                f"{row['tokens']:,}",
                f"{row['loss']:.4f}",
                valid.get(row["step"], ""),
            )
            for row in chosen
        ),
    )


def _draw_losses(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = {row["step"]: row["tokens"] for row in rows if row["kind"] == "train"}
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, label in (("train", "training"), ("eval", "validation")):
        points = [(r["step"], r["loss"]) for r in rows if r["kind"] == kind and r["step"] in tokens]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot([tokens[step] for step in steps], losses, label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _data_table(config: RunConfig) -> str:
    data, rows, absent = config.data, [], []
    for prefix in data.train:
        try:
            manifest = load_manifest(Path(prefix))
        except DataError:
            absent.append(f"`{prefix}`")
            continue
        rows.append(
            (
                f"`{Path(prefix).name}`",
                f"{manifest.documents:,}",
                f"{manifest.tokens:,}",
                f"{manifest.text_bytes:,}",
                f"`{manifest.files['bin'].sha256[:16]}`",
                f"`{manifest.tokenizer_sha256[:16]}`",
            )
        )
    header = ("pair", "documents", "tokens", "bytes of text", "SHA-256 of .bin", "of its tokenizer")
    text = markdown_table(header, rows) if rows else ""
    if absent:
        text += f"\n\nWithout a manifest ({manifest_path(Path('PREFIX'))}): {', '.join(absent)}."
    return text.strip() or "The run names no training data."
