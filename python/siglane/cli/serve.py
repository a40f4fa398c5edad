"""`siglane serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TextIO

from siglane.cli.common import MODEL, MODEL_ARGUMENT, ModelOptions
from siglane.errors import UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import MediaConfig
from siglane.settings.options import options_of
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

MEDIA = {option.name for option in options_of(MediaConfig)}
ARGUMENTS = (MODEL_ARGUMENT,)
OPTIONS = (
    MODEL,
    OptionGroup(ServerConfig, "server", only={option.name for option in options_of(ServerConfig)} - MEDIA),
    OptionGroup(MediaConfig, "images and videos of requests"),
    OptionGroup(ImageBudget, "budget of every image; clients may ask for less"),
    OptionGroup(EngineConfig, "engine"),
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    from siglane.weights.demo import FOLDERS, demo_folder

    config = read_options(ServerConfig, arguments)
    engine = read_options(EngineConfig, arguments)
    budget = read_options(ImageBudget, arguments)
    model = arguments.model
    if model in FOLDERS:
        config = dataclasses.replace(config, served_model_name=config.served_model_name or model)
        model = str(demo_folder() / FOLDERS[model])
    try:
        from siglane.server import logs
        from siglane.server.launch import preflight, serve
    except ImportError as error:
        message = f"the server needs more packages ({error}); pip install 'siglane[server]'"
        raise UserError(message, code="missing_extra") from error

    if config.log_format == "json":  # also for what is found wrong before anything is served
        logs.begin(config.log_format, config.log_level)
    listener = preflight(config, model)

    from siglane.engine.process.child import EngineSpec

    spec = EngineSpec(model, engine, **dataclasses.asdict(read_options(ModelOptions, arguments)))
    return serve(config, spec, listener, budget)
