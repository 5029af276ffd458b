"""Fields that a request may carry and this server does not act on: refused when they would matter, else let through."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from server.errors import invalid, unsupported

logger = logging.getLogger(__name__)

MAX_NAMED_FIELDS = 100
"""Unknown names that are remembered; a client that invents names must not fill the memory or the log."""

ACCEPTED_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
    }
)

_NO_EFFECT_VALUES: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "echo": (False,),  # of a chat; the next four of a text completion, which has neither calls nor turns
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "top_logprobs": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "min_new_tokens": (0,),
    "n_predict": (),
    "typical_p": (1,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "priority": (0,),
    "prompt_embeds": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),  # of a chat, whose template writes them
    "spaces_between_special_tokens": (True,),
}
"""Fields that this server has no code for, with the values (besides null) that change nothing."""


def refuse_unsupported(extra: Mapping[str, Any], num_choices: int) -> None:
    """Raise a 400 for the first field that would have an effect which the answer would lack."""
    for name, harmless in _NO_EFFECT_VALUES.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            allowed = "" if not harmless else f", or send {json.dumps(harmless[0])}"
            raise unsupported(f"{name} is not supported here; leave it out{allowed}", name)
    best_of = extra.get("best_of")
    if best_of is not None and best_of != num_choices:
        if isinstance(best_of, int) and best_of < num_choices:
            raise invalid(f"best_of must be at least n ({num_choices}), got {best_of}", "best_of")
        raise unsupported(f"best_of above n ({num_choices}) is not supported by this server; ask for more choices", "best_of")


class UnknownFields:
    """Names each unknown field once in the log, so that a misspelt one can be found."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def note(self, extra: Mapping[str, Any]) -> None:
        """Log the names that were not seen before."""
        known = ACCEPTED_WITHOUT_EFFECT | _NO_EFFECT_VALUES.keys() | {"best_of"}
        for name in extra.keys() - known - self._named:
            if len(self._named) >= MAX_NAMED_FIELDS:
                return
            self._named.add(name)
            logger.warning("ignoring the unknown field %.80r; it is not named again", name)
