"""The examples that end the help of every command."""

from __future__ import annotations

__all__ = ["EXAMPLES", "epilog"]

EXAMPLES = {
    "demo": ("tokenmerge demo --limit 500",),
    "bench": (
        "tokenmerge bench vit_small_patch16_224 -r 0 8 13 -b 1 8 --out bench.html",
        "tokenmerge bench my_vit/ -r 16 -b 64 --device cuda --dtype bfloat16",
    ),
    "eval": (
        "tokenmerge eval my_vit/ --data photos/val -r 0 8 16 --bound --out eval.html eval.pdf",
        "tokenmerge eval hf:facebook/dinov2-small --data files:photos -r 0 8 --retrieval",
    ),
    "compare": (
        "tokenmerge compare reference --data fashion-mnist --limit 500 --methods tome tofu -r 8",
        "tokenmerge compare my_vit/ --data photos/val --methods all --macs 0.75 0.5",
    ),
    "doctor": (
        "tokenmerge doctor hf:facebook/dinov2-small -r 8",
        "tokenmerge doctor my_vit/ --config merge.json",
    ),
    "export": (
        "tokenmerge export my_vit/ -r 8 --to onnx --out merged.onnx",
        "tokenmerge export my_vit/ --method merge.json --to openvino --out merged.xml",
    ),
    "tune": (
        "tokenmerge tune my_vit/ --data photos --target 1.5x -o merge.json",
        "tokenmerge tune my_vit/ --data photos --target 2x drop=0.5 -o merge.json",
    ),
    "embed": (
        "tokenmerge embed hf:facebook/dinov2-small --data photos --out photos-dinov2 -r 8",
        "tokenmerge embed my_vit/ --data 'shards/{000..009}.tar' --out labels --output logits",
    ),
    "explore": (
        "tokenmerge explore hf:google/vit-base-patch16-224 photo.jpg -r 4 8 16 -o explore.html",
        "tokenmerge explore my_vit/ photos/a.jpg photos/b.jpg --methods tome auto --labels classes.txt",
    ),
    "viz": (
        "tokenmerge viz photo.jpg -m hf:google/vit-base-patch16-224 -r 16 --block all -o pictures",
        "tokenmerge viz clip.mp4 -m my_vit/ -r 16 --video gif -o pictures",
    ),
    "train": ("tokenmerge train finetune --set model.name=my_vit/ data.source=folder:photos --out runs/mine",),
    "vlm": ("tokenmerge vlm llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt 'What is this?' --keep 1 0.5",),
    "list": ("tokenmerge list --json",),
}


def epilog(command: str) -> str:
    """Return the last lines of a command's help."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES[command])])
