"""From one format to another: plan, jobs, output, verification."""
