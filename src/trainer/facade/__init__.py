"""The parts of ``Trainer`` by topic: mixins that assemble and delegate, and keep no state."""
