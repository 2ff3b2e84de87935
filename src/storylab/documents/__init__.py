"""The documents that ``--json`` prints: one struct for each verb, one entry in :data:`DOCUMENTS`.

The name in ``schema`` ends with a version. Within a version fields are added, with a default; none is
removed, renamed, or given another type, unit or meaning. Numbers are in SI units, bytes and nats, which
the name of the field says. A reader ignores fields that it does not know. This package loads neither numpy
nor torch.
"""

from __future__ import annotations

from storylab.documents.compare import CompareDocument
from storylab.documents.doctor import DoctorDocument
from storylab.documents.eval import EvalDocument
from storylab.documents.experiment import ExperimentDocument
from storylab.documents.info import InfoDocument
from storylab.documents.list import ListDocument
from storylab.documents.noise import NoiseDocument
from storylab.documents.plan import PlanDocument
from storylab.documents.verify import VerifyDocument

Document = (
    CompareDocument
    | DoctorDocument
    | EvalDocument
    | ExperimentDocument
    | InfoDocument
    | ListDocument
    | NoiseDocument
    | PlanDocument
    | VerifyDocument
)

# The document of every verb that has --json.
DOCUMENTS = {
    "list": ListDocument,
    "plan": PlanDocument,
    "eval": EvalDocument,
    "info": InfoDocument,
    "doctor": DoctorDocument,
    "noise": NoiseDocument,
    "compare": CompareDocument,
    "experiment run": ExperimentDocument,
    "experiment confirm": ExperimentDocument,
    "verify": VerifyDocument,
}
