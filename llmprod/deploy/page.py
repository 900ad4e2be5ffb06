"""The page: type a text, see the answer and the words it rests on, say whether it is right."""

import asyncio
import os
import re

import numpy as np

from llmprod.deploy.bundle import Bundle
from llmprod.deploy.service import Service
from llmprod.extras import extra

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
with extra("serve"):
    import gradio as gr
    from fastapi import FastAPI

LONGEST = 200  # words that are shown with their weight
THEME = gr.themes.Base(font=["system-ui", "sans-serif"])  # the default would be fetched from elsewhere
HINT = "red words speak for the answer, blue ones against it: how much its probability falls without the word"


def occlusion(bundle: Bundle, text: str) -> list[tuple[str, float]]:
    """Each word, and how much the answer's probability falls without it, by the largest fall (Zeiler & Fergus 2014).

    It asks the model once for each word, and so works for any, int8 too.
    """
    words = re.findall(r"\S+\s*", text)[:LONGEST]
    without = ["".join(words[:i] + words[i + 1 :]).strip() or "." for i in range(len(words))]
    whole, *rest = bundle.probabilities([text, *without])
    falls = whole.max() - np.array(rest)[:, whole.argmax()]
    return [(word, float(fall)) for word, fall in zip(words, falls / max(np.abs(falls).max(), 1e-9), strict=True)]


def mount(app: FastAPI) -> FastAPI:
    """The application with the page at `/`."""
    return gr.mount_gradio_app(app, build(app.state.service), path="/", footer_links=[], theme=THEME)


def build(service: Service) -> gr.Blocks:
    """The page. It answers and keeps feedback as the routes do."""

    async def ask(text: str) -> tuple[dict, list, str, str]:
        if not text.strip():
            raise gr.Error("Type a text first.")
        (found,) = await service.classify([text[: service.limits.characters]], "page")
        bundle = service.batcher.bundle
        (whole,) = await asyncio.to_thread(bundle.predict, [text])
        words = await asyncio.to_thread(occlusion, bundle, text)
        said = f"{found.label}, {found.confidence:.0%}" + ("" if found.sure else ": not sure, a person should look")
        return whole.probabilities, words, said, found.id

    def tell(identity: str, verdict: str, label: str) -> str:
        if not identity:
            raise gr.Error("Ask for an answer first.")
        if service.store is None:
            raise gr.Error("This service keeps no feedback: start it with --store.")
        service.store.add_feedback(identity, "page", verdict, label)
        return "Thank you: kept." if verdict != "corrected" else f"Thank you: kept as {label}."

    with gr.Blocks(title="llmprod", analytics_enabled=False) as page:
        gr.Markdown("# What is it about?")
        gr.Textbox(", ".join(service.batcher.bundle.labels), label="The classes", interactive=False)  # no Markdown
        identity = gr.State("")
        text = gr.Textbox(label="Text", lines=4, max_length=service.limits.characters, elem_id="text")
        gr.Button("Classify", variant="primary", elem_id="classify").click(
            ask,
            text,
            [
                gr.Label(label="Probabilities", num_top_classes=5),
                gr.HighlightedText(label=f"Words: {HINT}"),
                gr.Textbox(label="Answer", interactive=False, elem_id="answer"),
                identity,
            ],
        )
        with gr.Row():
            up = gr.Button("Right", elem_id="up")
            down = gr.Button("Wrong", elem_id="down")
            label = gr.Dropdown(service.batcher.bundle.labels, label="The right label", elem_id="label")
            correct = gr.Button("Correct it", elem_id="correct")
        thanks = gr.Textbox(label="Your feedback", interactive=False, elem_id="thanks")
        up.click(lambda name: tell(name, "up", ""), identity, thanks)
        down.click(lambda name: tell(name, "down", ""), identity, thanks)
        correct.click(lambda name, right: tell(name, "corrected", right), [identity, label], thanks)
    return page
