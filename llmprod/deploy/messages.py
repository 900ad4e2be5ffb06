"""The messages of the service: what clients send, what they get; the OpenAPI page is made from them."""

from typing import Annotated, Literal

from llmprod.extras import extra

with extra("serve"):  # pydantic comes with FastAPI
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=r"\S")]
Name = Annotated[str, StringConstraints(max_length=100, pattern=r"^[\w.@-]*$")]


class Texts(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"texts": ["Wheat prices rose."]}]})
    texts: list[Text] = Field(min_length=1, max_length=256)
    user: Name = ""


class Classified(BaseModel):
    """What the model says of one text. `id` is what feedback names."""

    id: str
    label: str
    confidence: float
    sure: bool
    bundle: str


class Classifications(BaseModel):
    """One answer for each text, in their order."""

    answers: list[Classified]


class Feedback(BaseModel):
    """What a user says of an answer: a thumb, or the right label."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"id": "5f0c-0", "user": "u17", "verdict": "corrected", "label": "grain"}]},
    )
    id: Name
    user: Name
    verdict: Literal["up", "down", "corrected"]
    label: str = Field("", max_length=200)


class Turns(BaseModel):
    """A customer's turns so far, the oldest first."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"turns": ["Where is my order?"]}]})
    turns: list[Text] = Field(min_length=1, max_length=50)


class Wanted(BaseModel):
    """What someone liked, by the ids of the catalogue, what they wish for in words, or both."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"liked": ["50"], "wish": "A space adventure with robots", "count": 5}]},
    )
    liked: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] = Field([], max_length=1000)
    wish: str = Field("", max_length=2000)
    count: int = Field(10, ge=1, le=100)
