"""Every flag of the commands, as grouped dataclasses; and the flags of other stacks that are accepted. No torch."""
