"""What the routes take. Unknown fields are ignored, as OpenAI and vLLM do, but one that would change the answer and
is not supported here is refused: a silent difference costs its user a day."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Token = Annotated[int, Field(ge=0)]


def _unsupported(*neutral: Any) -> BeforeValidator:
    """Accepts the values that change nothing."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return None
        raise ValueError("this is not supported by the embedded engine; leave it out")

    return BeforeValidator(check)


Never = Annotated[None, _unsupported([], {}, "")]
NoPenalty = Annotated[None, _unsupported(0, 0.0)]
OnlyOne = Annotated[None, _unsupported(1)]
TextOnly = Annotated[None, _unsupported({"type": "text"})]
NoChoice = Annotated[None, _unsupported("none", "auto")]
NeutralRepetition = Annotated[None, _unsupported(1, 1.0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """What both completion routes share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    ignore_eos: bool | None = None
    n: OnlyOne = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    repetition_penalty: NeutralRepetition = None
    logit_bias: Never = None
    response_format: TextOnly = None

    def stops(self) -> tuple[str, ...]:
        """Empty strings would stop before the first token."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(SamplingBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Never = None
    tool_choice: NoChoice = None
    functions: Never = None


class CompletionBody(SamplingBody):
    prompt: str | list[Token] | list[str] | list[list[Token]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Never = None
    best_of: OnlyOne = None


class LoadBody(Body):
    lora_name: str = Field(min_length=1, max_length=253)
    lora_path: str = Field(min_length=1)


class UnloadBody(Body):
    lora_name: str
