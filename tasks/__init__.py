"""One file a stage: read artefacts, call `influence`, write artefacts."""
