"""Language-model back ends behind one protocol on token ids."""
