"""Chats as they lie around: ShareGPT, Alpaca, other names of fields and roles; sources by URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from titan_ulysses.config.schema import SourceSettings
from titan_ulysses.data.records import BadRow, Chat, Row, read_record
from titan_ulysses.distributed.errors import UserError

ASKED = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
SHARE_GPT = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]


def read(record: dict[str, Any], **settings: Any) -> Chat | str:
    """The chat of a record, or why it is refused."""
    row = read_record(record, SourceSettings(source="chat", **settings), "here")
    if isinstance(row, BadRow):
        return row.reason
    assert isinstance(row.content, Chat)
    return row.content


OTHER_NAMES: dict[str, Any] = {
    "messages_field": "dialogue",
    "message_fields": {"role": "speaker", "content": "text", "reasoning_content": "thoughts"},
    "roles": {"customer": "user", "agent": "assistant"},
}


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({"conversations": SHARE_GPT}, {}, ASKED),
        ({"messages": SHARE_GPT}, {}, ASKED),
        ({"talk": SHARE_GPT}, {"messages_field": "talk"}, ASKED),
        ({"instruction": "what?", "output": "that"}, {}, ASKED),
        ({"instruction": "what?", "input": "", "output": "that"}, {}, ASKED),
        (
            {
                "instruction": "what?",
                "input": "this",
                "output": "that",
                "system": "be brief",
                "history": [["hm?", "yes"]],
            },
            {},
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hm?"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "what?\nthis"},
                ASKED[1],
            ],
        ),
        (
            {"q": "what?", "a": "that", "system": "no"},
            {"prompt_field": "q", "completion_field": "a"},
            ASKED,
        ),
        (
            {
                "dialogue": [
                    {"speaker": "customer", "text": "what?"},
                    {"speaker": "agent", "text": "that", "thoughts": "hm"},
                ]
            },
            OTHER_NAMES,
            [ASKED[0], {**ASKED[1], "reasoning_content": "hm"}],
        ),
    ],
)
def test_what_lies_around_is_a_chat(
    record: dict[str, Any], settings: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    chat = read(record, **settings)
    assert isinstance(chat, Chat) and not chat.untrained
    assert [dict(sorted(one.items())) for one in chat.messages] == [
        dict(sorted(one.items())) for one in expected
    ]


def test_which_turns_are_trained_on() -> None:
    chat = read({"messages": 3 * ASKED}, train_on="last")
    assert isinstance(chat, Chat) and chat.untrained == {1, 3}
    for name, off, on in (("weight", 0, 1), ("loss", False, True), ("train", False, True)):
        flagged = [ASKED[0], {**ASKED[1], name: off}, ASKED[0], {**ASKED[1], name: on}]
        chat = read({"messages": flagged})
        assert isinstance(chat, Chat) and chat.untrained == {1}
        assert all(name not in message for message in chat.messages)
    assert read({"messages": [{**ASKED[0], "weight": 1}, ASKED[1]]}) == read({"messages": ASKED})


@pytest.mark.parametrize(
    ("record", "settings", "why"),
    [
        ({"text": "a"}, {}, 'no field "messages" (it has text)'),
        ({"conversations": "a"}, {}, 'the field "conversations" holds "a", not a list of messages'),
        ({"instruction": 1, "output": "a"}, {}, 'the field "instruction" holds 1, not text'),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            {},
            'the field "history" holds ["c"], not a list of pairs of texts',
        ),
        ({"messages": [{**ASKED[1], "weight": 0.5}]}, {}, '"weight" is 0.5, neither 0 nor 1'),
        ({"messages": SHARE_GPT}, {"message_fields": {"role": "who"}}, "message 0 has no role"),
    ],
)
def test_what_is_no_chat_is_refused(
    record: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    assert why in str(read(record, **settings))


def test_sources_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied once, and again where they have changed; a folder, a file and a pattern."""
    import fsspec

    from titan_ulysses.data import remote
    from titan_ulysses.data.sources import open_rows

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store, copied = fsspec.filesystem("memory"), []
    download = remote._download
    monkeypatch.setattr(
        remote, "_download", lambda *arguments: copied.append(arguments[1]) or download(*arguments)
    )

    def texts(url: str, kind: str = "jsonl") -> list[Any]:
        rows = open_rows(SourceSettings(source=kind, path=url))  # type: ignore[arg-type]
        return [row.content for row in rows if isinstance(row, Row)]

    for name in ("a", "sub/b"):
        store.pipe(f"/bucket/{name}.jsonl", json.dumps({"text": name}).encode())
    store.pipe("/bucket/c.txt", b"a text")
    assert texts("memory://bucket") == ["a", "sub/b"] and len(copied) == 3
    assert texts("memory://bucket") == ["a", "sub/b"] and len(copied) == 3
    store.pipe("/bucket/a.jsonl", json.dumps({"text": "changed"}).encode())
    store.rm("/bucket/sub/b.jsonl")
    assert texts("memory://bucket") == ["changed"] and len(copied) == 4
    assert texts("memory://bucket/a.jsonl") == ["changed"]
    assert texts("memory://bucket/*.txt", "text") == ["a text"]
    for url, why in {
        "memory://nothing/here": "FileNotFoundError",
        "no-such-store://bucket": "Protocol not known",
    }.items():
        with pytest.raises(UserError, match=f'data.path = "{url}" cannot be read .*{why}'):
            texts(url)


def test_an_absolute_path_is_never_asked_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from titan_ulysses.data.sources import open_rows
    from titan_ulysses.model.hf import load_model_config

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    with pytest.raises(UserError, match='model.path = "/no/model": no such folder'):
        load_model_config("/no/model", None)
    with pytest.raises(UserError, match='data.path = "/no/data" does not exist'):
        open_rows(SourceSettings(source="hf", path="/no/data"))
