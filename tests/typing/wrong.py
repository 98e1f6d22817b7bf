"""Calls that every checker refuses, each at the line that says so, in a message with the word given. Never run."""

from torch import Tensor, nn

import tokenmerge
from tokenmerge import MergeConfig, ToMe
from tokenmerge.data.labelled import open_data
from tokenmerge.tools.bench import bench
from tokenmerge.tools.compare import compare
from tokenmerge.tools.doctor import examine
from tokenmerge.tools.evaluate import evaluate


def patches(model: nn.Module, images: Tensor) -> None:
    tokenmerge.patch("vit_tiny_patch16_224", r=8)  # wrong Module: a name is no model
    tokenmerge.patch(model, r="8")  # wrong patch: r is no text
    tokenmerge.patch(model, r=[8, "8"])  # wrong str
    tokenmerge.patch(model, 8)  # wrong MergeConfig: the second argument is the method
    tokenmerge.patch(model, "tome", 8)  # wrong positional: r goes by its name
    tokenmerge.patch(model, ToMe, r=8)  # wrong ToMe: a class is no method
    tokenmerge.patch(model, r=8, trak=True)  # wrong trak: a misspelt keyword
    tokenmerge.patch(model, r=8, track="yes")  # wrong bool
    tokenmerge.patch(model, r=8, restore="all")  # wrong restore: dense or merged
    tokenmerge.patch(model, r=8, prop_attn="off")  # wrong prop_attn: auto, or a bool
    tokenmerge.patch(model, r=8, multiple_of=0.5)  # wrong multiple_of
    tokenmerge.patch(model, r=8, blocks=model)  # wrong blocks: a path is a text
    tokenmerge.patch(model, "auto", r=8, calibrate=[images])  # wrong Tensor: one tensor
    tokenmerge.patched(model, r=8, metric="x")  # wrong metric: an option of the method
    tokenmerge.patch(model, r=lambda block: 8)  # wrong patch: it is given two numbers
    tokenmerge.unpatch(model, r=8)  # wrong "r"


def methods(model: nn.Module) -> None:
    ToMe(metrik="x")  # wrong metrik
    MergeConfig("tome", r=8, restor="dense")  # wrong restor
    MergeConfig(8)  # wrong Reduction
    tokenmerge.methods.ToFuu  # wrong ToFuu
    tokenmerge.errors.UnsupportedModel  # wrong UnsupportedModel
    tokenmerge.tools.benhc  # wrong benhc
    tokenmerge.pach  # wrong pach
    tokenmerge.describe(8)  # wrong describe
    tokenmerge.from_pretraind("fast")  # wrong from_pretraind
    tokenmerge.save_pretrained(model, "fast", repo="me/fast")  # wrong repo


def handles(model: nn.Module) -> None:
    handle = tokenmerge.patch(model, r=8)
    handle.r = "8"  # wrong assign
    handle.tokens = [3]  # wrong tokens: it is told, not set
    handle.report().kernel  # wrong kernel: kernels
    handle.config.r = 3  # wrong MergeConfig: a configuration is a value
    tokenmerge.handle_of(model, None).tokens  # wrong None: there may be none
    tokenmerge.supports(model).adapter.reason  # wrong reason


def results(model: nn.Module) -> None:
    bench(model, rs=8)  # wrong rs: several
    bench(model, restore="all")  # wrong restore
    bench(model, round=3)  # wrong round
    tokenmerge.vlm.patch(model, keeping=0.5)  # wrong keeping: keep
    tokenmerge.vlm.patch(model, keep="half")  # wrong keep: a number
    bench(model).rows[0].speedup  # wrong speedup: speed_up
    bench(model).rows[0].tokens = 3  # wrong assign: a column is read
    bench(model).rows[0].reference_ms + 1.0  # wrong None: only with compare=True
    bench(model).rows["speed-up"]  # wrong __getitem__: rows are a list
    data = open_data("images", model, batch_size=8)
    evaluate(model, "images")  # wrong Labelled: open_data opens a folder
    evaluate(model, data).rows[0].kl  # wrong kl: of compare alone
    compare(model, data)  # wrong methods: methods are missing
    compare(model, data, methods=["tome"]).rows[0].note.missing  # wrong missing
    examine(model).findings[0].wrong  # wrong wrong: good
