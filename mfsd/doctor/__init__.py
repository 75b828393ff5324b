# SPDX-License-Identifier: Apache-2.0
"""Looks at a machine and says what it means for mfsd.

Changes nothing, needs no daemon, and works without privileges as far as it goes: checks that need more say so.
"""

from mfsd.doctor.checkup import examine, run
from mfsd.doctor.finding import Context, Finding, Severity
from mfsd.doctor.paths import judge
from mfsd.doctor.transports import Flow, Report, measure

__all__ = ["Context", "Finding", "Flow", "Report", "Severity", "examine", "judge", "measure", "run"]
