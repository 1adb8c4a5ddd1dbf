"""The cost model: architectures, methods, hardware, predictions. numpy and the standard library.

from costmodel import Workload, load_architecture, load_hardware, predict
"""

from costmodel.architecture import Architecture as Architecture
from costmodel.hardware import HardwareProfile as HardwareProfile
from costmodel.hardware import gpu_names as gpu_names
from costmodel.hardware import load_hardware as load_hardware
from costmodel.methods import method_names as method_names
from costmodel.methods.parse import parse_method as parse_method
from costmodel.methods.stack import MethodStack as MethodStack
from costmodel.predict import predict as predict
from costmodel.registry import load_architecture as load_architecture
from costmodel.registry import model_names as model_names
from costmodel.results import Prediction as Prediction
from costmodel.workload import Workload as Workload
