"""`siglane generate`: one question about some pictures, one answer."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from siglane.cli.common import BUDGET, IMAGES, MODEL, MODEL_ARGUMENT, checkpoint_of
from siglane.cli.output import emit_json
from siglane.errors import UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions, described, option
from siglane.tiling.rule import ImageBudget
from siglane.types import SamplingParams

if TYPE_CHECKING:
    from siglane.llm import Generation

SAMPLING_HELP = {
    "max_tokens": "longest answer; none: as long as the context allows",
    "temperature": "0 takes the likeliest token, higher values are more varied; the checkpoint's own is not read here",
    "top_k": "choose among the k likeliest tokens only; 0: all",
    "top_p": "choose among the likeliest tokens that hold this share of the probability",
    "min_p": "drop tokens less likely than this share of the likeliest one",
    "repetition_penalty": "above 1 discourages tokens of prompt and answer",
    "frequency_penalty": "lowers a token for every time the answer has it",
    "presence_penalty": "lowers tokens that the answer has",
    "logit_bias": "TOKEN_ID:BIAS, added before choosing",
    "seed": "makes sampling repeatable; none draws one",
    "stop": "texts that end the answer; they are not part of it",
    "stop_token_ids": "token ids that end the answer",
    "ignore_eos": "go on after the model's own end of answer",
    "min_tokens": "shortest answer",
    "logprobs": "report log-probabilities, with this many alternatives per token (needs --json)",
    "n": "number of answers",
    "thinking_budget": "tokens a reasoning model may think before it has to answer; none: no limit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(CommandOptions):
    COMMAND = "generate"

    prompt: str = field(metadata=described("the question: one user message, its pictures first", short="-p"))
    image: tuple[str, ...] = option((), "pictures: paths or URLs", short="-i")
    video: tuple[str, ...] = option((), "videos: paths or URLs", short="-v")
    num_frames: int | None = option(None, "frames of each video that the model sees; none: as its family does")
    thinking: bool | None = option(None, "whether a reasoning model thinks first; none: as its chat template does")
    stream: bool = option(False, "print the answer as it grows")
    json: bool = option(False, "print one JSON object")


ARGUMENTS = (MODEL_ARGUMENT,)
OPTIONS = (
    OptionGroup(GenerateOptions, "generate"),
    OptionGroup(SamplingParams, "sampling", help=SAMPLING_HELP, only=tuple(SAMPLING_HELP)),  # guessing: the engine's
    MODEL,
    IMAGES,
    BUDGET,
    OptionGroup(EngineConfig, "engine"),
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(GenerateOptions, arguments)
    params = read_options(SamplingParams, arguments)
    engine = read_options(EngineConfig, arguments)
    decode = read_options(DecodeOptions, arguments).local
    if options.stream and options.json:
        raise UserError("--stream and --json exclude each other", code="bad_option")

    checkpoint = checkpoint_of(arguments)

    from siglane.engine.sampling.parameters import check_sampling
    from siglane.llm import LLM

    check_sampling(params)

    def show(_: int, text: str) -> None:
        out.write(text)
        out.flush()

    llm = LLM(checkpoint, decode=decode, budget=read_options(ImageBudget, arguments), **dataclasses.asdict(engine))
    videos = [{"video": source, "num_frames": options.num_frames} for source in options.video]
    prompt = {"prompt": options.prompt, "images": options.image, "videos": videos}
    if options.thinking and llm.processor.config.thinking is None:
        raise UserError("this model does not reason; leave --thinking out", code="bad_option")
    template = {} if options.thinking is None else {"enable_thinking": options.thinking}
    (answer,) = llm.generate(prompt, params, on_text=show if options.stream else None, chat_template_kwargs=template)
    if options.json:
        emit_json(document(answer), out)
    else:
        texts = ["" if options.stream else answer.text, *(other.text for other in answer.outputs[1:])]
        out.write("\n".join(texts) + "\n")
        if sys.stderr.isatty():
            print(summary(answer), file=sys.stderr)
    return 0


def document(answer: Generation) -> dict[str, Any]:
    """The JSON of one answer; `logprobs`, and the `outputs` of several answers, only when they were asked for."""
    usage = answer.usage
    found: dict[str, Any] = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "prompt_token_ids": list(answer.prompt_token_ids),
        "output_token_ids": list(answer.output_token_ids),
        "finish_reason": answer.finish_reason,
        "usage": dataclasses.asdict(usage) | {"text_tokens": usage.text_tokens, "total_tokens": usage.total_tokens},
        "images": list(answer.images),
        "timings": dataclasses.asdict(answer.timings),
    }
    if answer.logprobs:
        found["logprobs"] = [dataclasses.asdict(logprob) for logprob in answer.logprobs]
    if len(answer.outputs) > 1:
        found["outputs"] = [document(output) for output in answer.outputs]
    return found


def summary(answer: Generation) -> str:
    """One line for people: what went in, what came out, how long it took."""
    usage, timings = answer.usage, answer.timings
    thought = f" ({usage.reasoning_tokens} of them reasoning)" if usage.reasoning_tokens else ""
    return (
        f"{usage.image_tokens} image + {usage.text_tokens} text -> {usage.completion_tokens} tokens{thought}; "
        f"encode {timings.encode:.2f} s, prefill {timings.prefill:.2f} s, decode {timings.decode:.2f} s"
    )
