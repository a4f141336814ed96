"""Whether a draft model has the served model's tokens: an id has to mean the same to both."""

from __future__ import annotations

from pathlib import Path

from gptq_api.errors import ConfigError
from gptq_api.runner.draft_model import draft_path, vocabulary_sizes
from gptq_api.runner.options import LoadOptions
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import BlockingTokenizer
from gptq_api.text.tokenizer_config import TokenizerError
from gptq_api.text.tokens import TokenTable

_MOST_SHOWN = 40


def check_vocabulary(options: LoadOptions) -> None:
    """ConfigError where the draft model's tokens are others: by the tokenizers, where both folders have one, or by the
    number of rows. With the same tokens one of the models may have more rows, which stand for nothing; and control
    tokens may be called otherwise, as the spare ones of a base model are."""
    if options.draft_model is None:
        return
    served, draft = checkpoint_folder(options.model_path), draft_path(options)
    draft = draft if draft.is_dir() else draft.parent
    if served == draft:
        return
    ours, theirs = _table(served), _table(draft)
    if ours is None or theirs is None:
        if (sizes := vocabulary_sizes(options)) is not None and sizes[0] != sizes[1]:
            raise _refusal(options, f"it has {sizes[1]} tokens, the served model {sizes[0]}")
        return
    named = zip(_contents(ours), _contents(theirs), strict=False)
    for token_id, (one, other) in enumerate(named):
        if one != other and not (token_id in ours.special and token_id in theirs.special):
            raise _refusal(options, f"token {token_id} is {other[:_MOST_SHOWN]!r} there and {one[:_MOST_SHOWN]!r} here")
    num_here, num_there = len(_contents(ours)), len(_contents(theirs))
    if num_here != num_there:
        raise _refusal(options, f"its tokenizer has {num_there} tokens, the served model's {num_here}")


def _table(folder: Path) -> TokenTable | None:
    """None where there is no tokenizer that can be read."""
    try:
        tokenizer = BlockingTokenizer(folder)
    except TokenizerError:
        return None
    tokenizer.close()
    return tokenizer.table


def _contents(table: TokenTable) -> list[str]:
    """By id, without what stands for nothing behind the last."""
    num = len(table.contents)
    while num and not table.contents[num - 1]:
        num -= 1
    return table.contents[:num]


def _refusal(options: LoadOptions, why: str) -> ConfigError:
    return ConfigError(
        f"--draft-model {options.draft_model} has another vocabulary: {why}; take a small model of the same family"
    )
