"""The dashboards there are."""

from tools.dashboards.experts import EXPERTS
from tools.dashboards.faults import FAULTS
from tools.dashboards.machines import MACHINES
from tools.dashboards.overview import OVERVIEW

BOARDS = (OVERVIEW, EXPERTS, FAULTS, MACHINES)
