"""The page itself, by Gradio. What it shows is made elsewhere: here are its parts, and who may do what when."""

from __future__ import annotations

import logging
import time
from typing import Any

import gradio as gr

from ..names import paths_in
from .bench import Asked
from .choices import NO_DEFENCE, attack_names, shown_attack, takes_steps
from .command import Prepared
from .drawing import CSS, drawn, status
from .looking import Stopped

logger = logging.getLogger(__name__)

TITLE = "What does CLIP see?"
INTRODUCTION = """\
# What does CLIP see?
Choose a picture or upload one, name some classes, and press **Attack**: each model is attacked by itself, white box,
with no pixel changed by more than the radius. One picture is no measurement; `hf-robust-clip evaluate` measures."""
READY = "Ready."
WAITS = "Waiting for the models ..."
REFUSED = "The request can't be read: choose radius, steps and attack again, or reload the page."
KEPT_SECONDS = 3600  # of uploaded files
LONGEST_ERROR = 400
WAITING = 20  # visitors who may wait for their turn


class Page:
    """A page before some models.

    Args:
        prepared: models, examples, and what is chosen at first.
    """

    def __init__(self, prepared: Prepared):
        self.prepared, self.bench = prepared, prepared.bench
        with gr.Blocks(
            title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS), fill_width=False
        ) as self.blocks:
            self._build()

    def serve(self, host: str | None = None, port: int | None = None, share: bool = False, wait: bool = True) -> str:
        """Serve until it is interrupted; the address where it doesn't wait."""
        self.blocks.queue(max_size=WAITING, default_concurrency_limit=1)
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=not wait,
            inbrowser=False,
            show_error=False,
            allowed_paths=[],
            max_file_size=f"{self.bench.limits.megabytes}mb",
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            quiet=False,
        )
        return address

    @property
    def titles(self) -> tuple[str, str]:
        """What stands above the columns: the same model twice is told apart by the defence alone."""
        same = self.bench.undefended[1] is self.bench.robust[1]
        return ("Without a defence", "With the defence") if same else ("Undefended", "Robust")

    def _build(self) -> None:
        prepared, bench, limits = self.prepared, self.bench, self.bench.limits
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, format="png",
                    sources=["upload", "clipboard"], height=260, elem_id="picture", buttons=[],
                )  # fmt: skip
                picture.preprocess = path_of  # a subclass would be a custom component
            with gr.Column(scale=3, min_width=320):
                classes = gr.Textbox(
                    ", ".join(prepared.examples.class_names), lines=3, max_lines=6, elem_id="classes",
                    label=f"Class names, separated by commas (2 to {limits.classes})", placeholder="cat, dog, bird",
                )  # fmt: skip
                with gr.Row():
                    true_class = gr.Textbox(
                        label="True class", placeholder="empty: what each model names", elem_id="true-class",
                    )  # fmt: skip
                    templates = gr.Textbox(
                        "\n".join(prepared.templates), label="Prompt", elem_id="prompt", max_lines=4
                    )
                attack = gr.Dropdown(
                    [(shown_attack(name), name) for name in attack_names()], value=attack_names()[0], label="Attack",
                    elem_id="attack",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                levels = gr.Slider(
                    0, bench.most_levels, prepared.levels, step=0.5, label="Radius, in 255ths of the pixel range",
                    elem_id="radius",
                )  # fmt: skip
                steps = gr.Slider(
                    1, limits.steps, min(20, limits.steps), step=1, label="Steps N", elem_id="steps",
                    interactive=takes_steps(attack_names()[0]),
                )  # fmt: skip
                defence = gr.Dropdown(
                    list(bench.defences), value=prepared.defence, elem_id="defence",
                    label="Test-time defence of the robust model",
                )  # fmt: skip
                through = gr.Checkbox(
                    True, label="attack through the defence", elem_id="through",
                    interactive=prepared.defence != NO_DEFENCE,
                )  # fmt: skip
                with gr.Row():
                    run = gr.Button("Attack", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        gallery = self._gallery()
        line = gr.HTML(status(READY), elem_id="status")
        with gr.Row(equal_height=True):
            columns = [gr.HTML("", elem_id="undefended"), gr.HTML("", elem_id="robust")]
        if gallery is not None:
            gallery.click(self.choose, [gallery], [picture, true_class], api_visibility="private", queue=False)
        picture.upload(lambda: "", None, true_class, api_visibility="private", queue=False)
        picture.clear(lambda: "", None, true_class, api_visibility="private", queue=False)
        attack.change(self.steps_shown, attack, steps, api_visibility="private", queue=False)
        defence.change(self.switch_shown, defence, through, api_visibility="private", queue=False)
        outputs = [line, *columns]
        asked = [picture, classes, templates, true_class, attack, steps, levels, defence, through]
        begun = run.click(self.begin, None, [*outputs, run, stop], api_visibility="private", queue=False)
        ended = begun.then(
            self.look, asked, outputs, api_visibility="private", concurrency_limit=1, concurrency_id="models",
            show_progress="full", show_progress_on=[line], trigger_mode="once",
        )  # fmt: skip
        ended.then(self.end, line, [line, run, stop], api_visibility="private", queue=False)
        stop.click(self.stop, None, None, api_visibility="private", queue=False)
        self.blocks.unload(self.stop)

    def _gallery(self) -> gr.Dataset | None:
        examples = self.prepared.examples
        if not examples.pictures:
            return None
        return gr.Dataset(
            components=[gr.Image(visible=False, format="png", image_mode=None, type="pil")],
            samples=[[picture] for picture in examples.pictures], label="Examples", type="index",
            samples_per_page=40, elem_id="examples", layout="gallery",
        )  # fmt: skip

    def choose(self, index: int) -> tuple[Any, str]:
        """An example, with its class."""
        examples = self.prepared.examples
        return examples.pictures[index], examples.labels[index]

    def steps_shown(self, attack: str) -> Any:
        """Whether an attack takes a number of steps."""
        return gr.update(interactive=takes_steps(attack))

    def switch_shown(self, defence: str) -> Any:
        """Whether there is a defence to attack through."""
        return gr.update(interactive=defence != NO_DEFENCE)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """What was shown belongs to other settings: take it away, and let the visitor stop."""
        self.bench.begin(visitor_of(request))
        return status(WAITS), "", "", gr.update(interactive=False), gr.update(interactive=True)

    def look(
        self,
        picture: str | None,
        classes: str,
        templates: str,
        true_class: str,
        attack: str,
        steps: float,
        levels: float,
        defence: str,
        through: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how gradio is asked for it
    ) -> tuple[str, str, str]:
        """Both models' columns, and a line above them; of what can't be the line alone."""
        asked = Asked(picture, classes, templates, true_class, attack, steps, levels, defence, through)  # type: ignore[arg-type]

        def tell(calls: int, what: str) -> None:
            progress((calls, None), desc=what, unit="model calls")

        start = time.monotonic()
        try:
            first, second = self.bench.look(asked, visitor_of(request), tell)
        except Stopped as error:
            return status(str(error)), "", ""
        except (ValueError, FloatingPointError) as error:
            return status(told_of(error), wrong=True), "", ""
        except Exception:
            logger.exception("a visitor's request failed")
            return status("The models failed on this; the server's log says why.", wrong=True), "", ""
        text = (
            f"{second.attack} at {levels:g}/255, {len(second.class_names)} classes: {time.monotonic() - start:.1f} s."
        )
        return status(text), drawn(first, self.titles[0]), drawn(second, self.titles[1])

    def end(self, line: str) -> tuple[str, Any, Any]:
        """Let the visitor ask again; where gradio itself refused the request, nothing was said yet."""
        line = status(REFUSED, wrong=True) if line == status(WAITS) else line
        return line, gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, request: gr.Request) -> None:
        """End what a visitor asked for."""
        self.bench.stop(visitor_of(request))


def path_of(payload: Any) -> str | None:
    """The path of an upload, which gradio made sure is one; what the file holds is `choices.read_picture`'s to see."""
    return None if payload is None else payload.path


def visitor_of(request: Any) -> str:
    """Who asks: one tab of a browser, or one client."""
    return str(getattr(request, "session_hash", None) or "")


def told_of(error: Exception) -> str:
    """An error in one line, which tells nothing of the server's disk."""
    line = " ".join(str(error).split()) or type(error).__name__
    if paths_in(line):
        logger.error("a visitor's request failed: %s", line)
        return "The models can't do this; the server's log says why."
    return line[:LONGEST_ERROR]
