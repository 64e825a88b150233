"""
Rate networks, τ dh = (−h + W φ(h) + I) dt + τσ dB, by Euler–Maruyama, with the exact gradient of the scheme.

`simulate` and `gradients` are the interface from Julia; `serve` is the worker that Python's neurosde talks to.
"""
module NeuroSDE

export simulate, gradients, standard_normals

include("simd.jl")
include("special.jl")
include("activation.jl")
include("random.jl")
include("tiles.jl")
include("problem.jl")
include("forward.jl")
include("adjoint.jl")
include("api.jl")
include("server.jl")

# What a worker runs first is kept in the package's cache (types from Julia 1.5 on, machine code from 1.9 on).
precompile(serve, (Int, Int, Int))
for T in (Float32, Float64)
    precompile(compute!, (Reader, Vector{Workspace{T}}, Int64, Tanh, Cint))
end

end
