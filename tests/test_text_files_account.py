"""nanochat/text_files.py, the account: what is printed, and when it is a warning."""


import pytest

from nanochat.text_files import MAX_NAMES, MAX_PRINTED_NAMES, Account


def test_names_are_bounded_but_all_counted():
    account = Account()
    for idx in range(MAX_NAMES + 5):
        account.leave_out(f"{idx}.png", "is no text", 1)
    line = account.describe()[1]
    assert line.startswith("left out 0.png, 1.png, ")
    assert line.endswith(f", and {MAX_NAMES + 5 - MAX_PRINTED_NAMES:,} more: is no text")
    assert len(account.reasons["is no text"]["names"]) == MAX_NAMES and account.files["left out"] == MAX_NAMES + 5


@pytest.mark.parametrize("num_left_out", [0, 5, 6])
def test_more_than_a_twentieth_is_a_warning(num_left_out):
    files, documents = Account(), Account()
    for idx in range(100):
        if idx < num_left_out:
            files.leave_out("name", "reason")
            documents.count("blank")
        else:
            files.add_file(".txt", 0)
            documents.count("kept")
    for account, unit in ((files, "files"), (documents, "documents")):
        expected = [f"WARNING: 6% of the {unit} were left out (6 of 100)"] if num_left_out == 6 else []
        assert account.get_warnings() == expected
    characters, num_bytes = Account(), Account()
    characters.count("kept", 94)
    characters.count("exact repeats of others", 6, 0)
    num_bytes.add_file(".txt", 94)
    num_bytes.bytes["left out"] += 6
    assert characters.get_warnings() == ["WARNING: 6% of the characters were left out (6 of 100)"]
    assert num_bytes.get_warnings() == ["WARNING: 6% of the bytes were left out (6 of 100)"]


def test_what_a_person_expects_is_no_warning():
    account = Account()
    account.leave_out(".git", "is hidden", 5000, "skipped")
    assert account.get_warnings() == [] and "skipped .git: is hidden" in account.describe()
