"""Use and ship trained models, without their dataset and teacher."""
