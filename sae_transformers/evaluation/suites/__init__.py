"""The suites of an evaluation. A new one is a file here and a line below; no torch is imported here."""

from __future__ import annotations

from .capability import CapabilitySuite
from .detection import DetectionSuite
from .fairness import FairnessSuite
from .intervention import InterventionSuite
from .receipt import ReceiptSuite
from .reconstruction import ReconstructionSuite
from .scar import ScarSuite
from .speed import SpeedSuite
from .steering import SteeringSuite
from .suite import SUITES as SUITES
from .suite import CardFacts as CardFacts
from .suite import Suite as Suite
from .suite import SuiteInputs as SuiteInputs
from .suite import card_facts as card_facts
from .suite import expected_suites as expected_suites
from .suite import register_suite as register_suite
from .suite import suite_of as suite_of

# In the order in which they are measured and shown.
register_suite("reconstruction", ReconstructionSuite)
register_suite("detection", DetectionSuite)
register_suite("steering", SteeringSuite)
register_suite("receipt", ReceiptSuite)
register_suite("scar", ScarSuite)
register_suite("intervention", InterventionSuite)
register_suite("fairness", FairnessSuite)
register_suite("capability", CapabilitySuite)
register_suite("speed", SpeedSuite)
