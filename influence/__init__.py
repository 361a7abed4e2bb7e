"""EK-FAC influence functions (Grosse, Bae, Anil et al. 2023): tensors in, tensors out.

The influence of a training sequence z on f = log p(completion | prompt) is

    I_f(z) = (1/N) ∇f(θ)ᵀ (G + λI)⁻¹ (−∇L(z, θ))           nats of f per extra copy of z

with L the loss summed over tokens and G the Gauss-Newton Hessian, approximated layer by layer as
G ≈ (Q_A ⊗ Q_S) diag(Λ) (Q_A ⊗ Q_S)ᵀ (Grosse et al. 2023, Eq. 19 and 25).

Notation, the same in every file:

    a, ds           layer inputs, output gradients              n t i(d_in), n t o(d_out)
    A, S            their second moments per supervised token   Kronecker factors
    Q_A, Q_S        eigenvectors of A and S, in columns         eigenbasis
    Λ               corrected eigenvalues                       d_out d_in
    λ               damping, per layer
    V               a matrix shaped like the layer's weight     d_out d_in

Axis letters: n sequences, t positions, i or d_in layer inputs (with the 1 of a bias), o or d_out
layer outputs, q queries, r rank, k neighbours, l layers, v vocabulary.

Reading order: sequences, layers, capture, objectives (what a pass sees); factors, eigenbasis,
sums, spectrum, damping, ekfac, solver (curvature); queries, lowrank, subspace, contraction, scores,
selfinfluence, streaming, tokens (attribution); tfidf, statistics. This file imports nothing, so
that a stage depends only on what it uses.
"""
