"""Times of engines: steps, prompts, requests under a constant load."""

from costmodel.serving.deployment import Deployment as Deployment
from costmodel.serving.engine_times import EngineTimes as EngineTimes
from costmodel.serving.engine_times import Load as Load
from costmodel.serving.engine_times import load_engine_times as load_engine_times
from costmodel.serving.metrics import KINDS as KINDS
from costmodel.serving.metrics import metric as metric
from costmodel.serving.served import Parts as Parts
from costmodel.serving.served import Served as Served
