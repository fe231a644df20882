"""The reports of a training: lines and metrics, the load of experts, plan against measurement, profiles."""
