# Nonlinearities φ and their slopes φ'(h) as functions of x = φ(h).

abstract type Activation end
struct Tanh <: Activation end
struct Sigmoid <: Activation end
struct Softplus <: Activation end
struct Relu <: Activation end
struct Linear <: Activation end

const ACTIVATIONS = (tanh = Tanh(), sigmoid = Sigmoid(), softplus = Softplus(), relu = Relu(), linear = Linear())

"Nonlinearity of a name: tanh, sigmoid, softplus, relu or linear."
function activation(name::Symbol)
    haskey(ACTIVATIONS, name) || throw(ArgumentError("phi must be one of $(keys(ACTIVATIONS)); got :$name."))
    ACTIVATIONS[name]
end

@inline (::Tanh)(h::Vec) = vtanh(h)
@inline (::Sigmoid)(h::Vec) = vsigmoid(h)
@inline (::Softplus)(h::Vec) = vsoftplus(h)
@inline (::Relu)(h::V) where {V<:Vec} = vmax(h, vconst(V, 0))
@inline (::Linear)(h::Vec) = h

@inline slope(::Tanh, x::V) where {V<:Vec} = vfma(vsub(vconst(V, 0), x), x, vconst(V, 1))
@inline slope(::Sigmoid, x::V) where {V<:Vec} = vmul(x, vsub(vconst(V, 1), x))
@inline slope(::Softplus, x::V) where {V<:Vec} = vsub(vconst(V, 1), vexp_negative(x))
@inline slope(::Relu, x::Vec) = vpositive(x)
@inline slope(::Linear, x::V) where {V<:Vec} = vconst(V, 1)

# φ at lanes that no vector fills: the last `count` numbers of a slab.
@inline function partly!(f::F, dst::Ptr{T}, src::Ptr{T}, count::Int, ::Type{V}) where {F,W,T,V<:Vec{W,T}}
    v = f(vload_part(V, src, count))
    vstore_part!(dst, v, count)
end

@inline function vload_part(::Type{V}, p::Ptr{T}, count::Int) where {W,T,V<:Vec{W,T}}
    V(ntuple(l -> VecElement(l <= count ? unsafe_load(p, l) : zero(T)), Val(W)))
end

@inline function vstore_part!(p::Ptr{T}, v::Vec{W,T}, count::Int) where {W,T}
    for l in 1:W
        l <= count && unsafe_store!(p, v[l].value, l)
    end
end

"dst[i] = f(src[i]), i = 1 … count."
@inline function map!(f::F, dst::Ptr{T}, src::Ptr{T}, count::Int) where {F,T}
    W = lanes(T)
    V = Vec{W,T}
    whole = count - count % W
    i = 0
    while i < whole
        vstore!(dst + i * sizeof(T), f(vload(V, src + i * sizeof(T))))
        i += W
    end
    count > whole && partly!(f, dst + whole * sizeof(T), src + whole * sizeof(T), count - whole, V)
    nothing
end
