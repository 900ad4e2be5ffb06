"""11_customer_service: understand a question, find its answer, compose a grounded reply, or hand over to a person."""
