"""The fields of a request that are for the model's chat template."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.api.body import MAX_FIELDS, at_most
from server.api.structured import check_depth
from server.errors import UnsupportedParameter
from server.text.chat_template import ALLOWED_KEYWORDS


def _known(keywords: dict[str, Any]) -> dict[str, Any]:
    for name, value in keywords.items():
        if name not in ALLOWED_KEYWORDS:
            known = ", ".join(sorted(ALLOWED_KEYWORDS))
            raise ValueError(f"{name[:64]!r} is not taken; expected some of {known}")
        # A template compares it with false, and "false" is something else to it.
        if name == "enable_thinking" and not isinstance(value, bool | None):
            raise ValueError("'enable_thinking' must be true or false")
    return {name: value for name, value in keywords.items() if value is not None}


Keywords = Annotated[dict[str, Any], AfterValidator(_known), at_most(MAX_FIELDS)]


class TemplateFields(BaseModel):
    """The fields of chat."""

    model_config = ConfigDict(strict=True)

    chat_template_kwargs: Keywords | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check_template_fields(self) -> None:
        """Raises UnsupportedParameter."""
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise UnsupportedParameter(
                "`add_generation_prompt` false is not supported: without that prompt the model "
                "would go on with the user's words; leave it out, or use `continue_final_message`",
                param="add_generation_prompt",
            )

    def keywords(self) -> dict[str, Any]:
        """What the template gets beside messages and tools. Raises InvalidRequest."""
        return keywords(self.chat_template_kwargs, thinks=self.reasoning_effort != "none")


def keywords(given: dict[str, Any] | None, *, thinks: bool) -> dict[str, Any]:
    """What is `given`, and that nothing is to be thought aloud unless it `thinks`. A template that
    does not know that takes no notice. Raises InvalidRequest for too many or too deep values."""
    check_depth(given or {}, "chat_template_kwargs")
    return ({} if thinks else {"enable_thinking": False}) | (given or {})
