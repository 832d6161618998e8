"""MMLU: multiple-choice questions in 57 subjects (arXiv 2009.03300); auxiliary_train holds others to learn from."""

from tasks.common import ChoiceTask, make_choice_conversation
from tasks.rows import check_columns, load_rows

COLUMNS = ("question", "subject", "choices", "answer")


class MMLU(ChoiceTask):
    """subset: all, auxiliary_train or a subject; split: dev, validation or test, of auxiliary_train only train."""

    def __init__(self, subset: str, split: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = load_rows("cais/mmlu", subset, split)
        check_columns(self._row(0), COLUMNS, f"cais/mmlu ({subset}, {split})")

    def _row(self, index: int) -> dict:
        row = self.rows[index]
        return row.get("train", row)    # the hub has auxiliary_train's columns inside another one

    def get_example(self, index: int) -> dict:
        row = self._row(index)
        return make_choice_conversation(row["question"], row["choices"], row["answer"]) | {"subject": row["subject"]}
