"""What a training tells: lines and metrics, the load of experts, plan against measurement, profiles."""
