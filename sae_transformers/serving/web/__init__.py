"""What stands between connections and the endpoints: deadlines, who may ask, and the record of each request."""
