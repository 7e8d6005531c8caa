"""The page: Gradio's components around `Models`. Nothing is loaded from elsewhere, or told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..serving.shipped import EXAMPLE_PROMPT
from .looking import LOWEST, Look, Models

# Before Gradio is imported: no statistics are sent, no version is asked for.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
TITLE = "Nothing was looked for"


def make_page(models: Models, threshold: float, examples: Sequence[Path] = ()) -> Any:
    """Gradio's Blocks, to be served by `launch`.

    Args:
        threshold: where the slider stands at first.
        examples: pictures that are offered.
    """
    import gradio as gr

    def shown(look: Look | None, threshold: float):
        if look is None:
            return None, gr.update(value=None), ""
        table = gr.update(value=look.rows(threshold), headers=look.headers())
        return look.drawn(threshold), table, look.summary(threshold)

    def detect(model: str, picture: str | None, text: str, threshold: float):
        try:
            look = models.look(model, picture, text)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title=TITLE, print_exception=False) from None
        return look, *shown(look, threshold)

    with gr.Blocks(title="Dynamic-DINO", analytics_enabled=False) as page:
        gr.Markdown("# Dynamic-DINO\nName what you are looking for, and get boxes.")
        look = gr.State()
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=360
                )
                text = gr.Textbox(
                    label="Names, separated by full stops", placeholder=EXAMPLE_PROMPT, lines=2
                )
                model = gr.Dropdown(list(models.loaders), label="Model", allow_custom_value=False)
                level = gr.Slider(LOWEST, 1, threshold, step=0.01, label="Lowest score shown")
                button = gr.Button("Detect", variant="primary")
                if examples:
                    gr.Examples([[str(file)] for file in examples], [picture])
            with gr.Column():
                boxes = gr.Image(
                    label="Found",
                    interactive=False,
                    format="png",
                    buttons=["fullscreen", "download"],  # and none that shares it on the hub
                )
                summary = gr.Markdown()
        table = gr.Dataframe(
            label="Detections; of a mixture of experts, those that each one's query took",
            interactive=False,
        )
        result = [boxes, table, summary]
        gr.on(
            [button.click, text.submit],
            detect,
            [model, picture, text, level],
            [look, *result],
            concurrency_limit=1,
            api_name="detect",
        )
        # The slider shows another part of what was found: the model doesn't look again.
        level.change(shown, [look, level], result, show_progress="hidden", api_name=False)
    return page


def launch(page: Any, host: str, port: int, block: bool = True) -> Any:
    """Serves it until Ctrl-C. Raises OSError where the port is taken."""
    import gradio as gr

    return page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=not block,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size="50mb",
        footer_links=[],
        # Gradio's own look at the page may take 3 s at most, too little for a busy machine.
        _frontend=False,
    )
