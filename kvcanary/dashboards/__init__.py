"""Files for operators: a Grafana dashboard and Prometheus alert rules over `kvcanary.observers.metrics`."""

from pathlib import Path

GRAFANA = Path(__file__).with_name("grafana.json")  #: to import into Grafana; asks for the data source
ALERTS = Path(__file__).with_name("alerts.yaml")  #: for ``rule_files`` of Prometheus
