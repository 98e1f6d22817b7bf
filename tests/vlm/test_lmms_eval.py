"""The script of docs/vlm.md for lmms-eval, on a small random model and a task of four images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ask import folder
from tiny_vlms import IMAGE

import tokenmerge

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its hundred dependencies

__all__ = ["folder"]

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
TASK = """
task: photos
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_visual: !function photos.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, num_beams: 1, do_sample: false}}
process_results: !function photos.results
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def results(doc, answers):
    return {"length": float(len(answers[0].split()))}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of four images of different sizes."""
    import datasets
    from PIL import Image

    torch.manual_seed(0)
    images = [Image.effect_noise((40 + 4 * number, 50), 90).convert("RGB") for number in range(4)]
    rows = {"image": images, "question": ["what is this ?"] * 4, "answer": ["cat"] * 4}
    own = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    own.to_parquet(str(tmp_path / "photos.parquet"))
    where = {"data": tmp_path / "photos.parquet", "cache": tmp_path / "cache"}
    (tmp_path / "photos.yaml").write_text(TASK.format(**where))
    (tmp_path / "photos.py").write_text(FUNCTIONS)
    return tmp_path


def evaluated(model: Path, task: Path, keep: float | None) -> tuple[list[str], Any]:
    """The answers to the questions of the task, as docs/vlm.md has it, and the handle; None: of the plain model."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    lm = get_model("llava_hf")(pretrained=str(model), device="cpu", device_map="cpu")
    lm.model.generation_config.suppress_tokens = [IMAGE, 71]  # random weights would say them
    handle = None if keep is None else tokenmerge.vlm.patch(lm.model, keep=keep, method="divprune")
    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=["photos"], task_manager=manager)
    assert found["results"]["photos"]["length,none"] == 4
    return [sample["filtered_resps"][0] for sample in found["samples"]["photos"]], handle


def test_the_script(folder: Path, task: Path, tmp_path: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = TEMPLATE
    model = tmp_path / "model"
    processor.save_pretrained(model)
    transformers.LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(model)
    plain, _ = evaluated(model, task, None)
    everything, _ = evaluated(model, task, 1.0)
    shorter, handle = evaluated(model, task, 0.25)
    assert everything == plain and shorter != plain and len(shorter) == 4
    assert handle.visual_tokens == [(16, 4)] and "16 -> 4" in str(handle.report())
