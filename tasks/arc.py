"""ARC: multiple-choice questions of natural science from school exams (arXiv 1803.05457), an easy and a hard set."""

from tasks.common import ChoiceTask, make_choice_conversation
from tasks.rows import load_rows


class ARC(ChoiceTask):
    """subset: ARC-Easy or ARC-Challenge; split: train, validation or test."""

    def __init__(self, subset: str, split: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = load_rows("allenai/ai2_arc", subset, split, columns=("question", "choices", "answerKey"))

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        # some rows count their choices 1 2 3 4 where most have A B C D: ours are always letters
        answer_idx = list(row["choices"]["label"]).index(row["answerKey"])
        return make_choice_conversation(row["question"], row["choices"]["text"], answer_idx)
