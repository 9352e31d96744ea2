"""TRL's GKDTrainer through a POCL curriculum: rank the rows by the student's loss on them, then train easy to hard.

    python examples/gkd_with_curriculum.py STUDENT TEACHER ROWS.jsonl OUT [--epochs 2] [--batch-rows 4]

STUDENT and TEACHER are Hub ids or directories of models that share a tokenizer, ROWS.jsonl holds chats: {"messages":
[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. Where pocl-ray has scored the rows already,
`Curriculum.from_run` takes the place of the first half.
"""

import argparse

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig
from trl.experimental.utils import DataCollatorForChatML

from pocl_ray.config import CurriculumConfig, ScheduleConfig
from pocl_ray.integrations.curriculum import Curriculum
from pocl_ray.integrations.gkd import CurriculumGKDTrainer


def reference_losses(model, collate, rows):
    """Return the student's mean loss on each row's last answer: the signal `ce_loss`."""
    losses = []
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            losses.append(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item())
    return losses


def main() -> None:
    """Score, plan, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("student", "teacher", "rows", "out"):
        parser.add_argument(name)
    parser.add_argument("--epochs", type=int, default=2, help="of each stage")
    parser.add_argument("--batch-rows", type=int, default=4, help="rows of an optimizer step")
    options = parser.parse_args()

    rows = datasets.load_dataset("json", data_files=options.rows, split="train")
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto")
    collate = DataCollatorForChatML(tokenizer=tokenizer, max_length=512)
    signals = {"ce_loss": reference_losses(student, collate, rows)}

    stages = CurriculumConfig(
        num_buckets=2, interval_epochs=options.epochs, kd_temperature=ScheduleConfig(start=1.0, end=2.0)
    )
    curriculum = Curriculum.from_signals(signals, stages, global_batch_rows=options.batch_rows)
    for stage in curriculum.stages:
        print(f"stage {stage.index}: {stage.num_rows} rows, {stage.num_steps} steps, T {stage.kd_temperature}")
    args = GKDConfig(
        options.out,
        per_device_train_batch_size=options.batch_rows,
        lmbda=0.5,
        max_new_tokens=32,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    trainer = CurriculumGKDTrainer(
        student, teacher, args, train_dataset=rows, processing_class=tokenizer, curriculum=curriculum
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
