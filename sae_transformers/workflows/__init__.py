"""One typed function for each verb: loaded objects in, a result out; nothing is printed."""
