"""Heavy libraries, imported once by the process that others are forked from."""

import av  # noqa: F401
import filelock  # noqa: F401
import jinja2  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import qwen_vl_utils  # noqa: F401
import torch.distributed  # noqa: F401
import transformers  # noqa: F401
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: F401
from transformers import (  # noqa: F401
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
