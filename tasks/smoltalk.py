"""SmolTalk: general conversations, in the selection made for small models (arXiv 2502.02737)."""

from tasks.common import Task
from tasks.rows import load_rows


class SmolTalk(Task):
    """split: train, 460K conversations, or test, 24K."""

    def __init__(self, split: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = load_rows("HuggingFaceTB/smol-smoltalk", None, split, columns=("messages",))

    def get_example(self, index: int) -> dict:
        return {"messages": self.rows[index]["messages"]}
